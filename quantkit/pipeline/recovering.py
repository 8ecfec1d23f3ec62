"""Recovery: one checkpoint by a command, and the rows of a report that are other variants, trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from quantkit import calibration
from quantkit.errors import CheckpointError, QuantizationError
from quantkit.estimation.measured import beside_measured
from quantkit.evaluation.stage import report_figures
from quantkit.exports.manifest import identity, read_manifest
from quantkit.merging import merged_source
from quantkit.pipeline.adapting import adapted
from quantkit.pipeline.context import Baseline, Run, attempted, marker, score_beside
from quantkit.pipeline.jobs import job_of
from quantkit.pipeline.titles import recover_title
from quantkit.pipeline.workers import Task
from quantkit.publishing import describe
from quantkit.quantization import Job, Quantized
from quantkit.recipe import CalibrationSpec, MergeSpec, ModelSpec, RecoverOptions, RecoverSpec, VariantSpec
from quantkit.recipe.model import HUB_REFERENCE
from quantkit.recovery.stage import STAGE, recover
from quantkit.source import SourceModel
from quantkit.system.artifacts import STAGE_FILE, check_writable, read_json
from quantkit.system.progress import Observer
from quantkit.system.scratch import workplace


def recover_one(
    checkpoint: Path,
    data: CalibrationSpec,
    options: RecoverOptions,
    out: Path,
    observer: Observer,
    *,
    source: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Quantized:
    """Train a checkpoint that quantkit wrote; see :func:`quantkit.recovery.stage.recover`.

    Args:
        checkpoint: its folder.
        data: on what it is trained.
        options: how.
        out: folder of the new checkpoint.
        observer: is told what happens.
        source: the float model; by default the one that the checkpoint says it was made of.
        device: where it is trained.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        QuantkitError: with what is wrong and the remedy.
    """
    check_writable(out, stage=STAGE, source=checkpoint)
    reference = source or source_of(checkpoint)
    with workplace(out, "recover") as scratch:
        observer.stage(f"source: {reference}")
        model = ModelSpec(source=reference, trust_remote_code=trust_remote_code)
        found = merged_source(model, MergeSpec(), scratch, observer)
        for note in _strange(checkpoint, found):
            observer.note(note)
        observer.stage(f"data: {data.dataset}")
        built = calibration.build(data, found.folder, scratch / "data", trust_remote_code=trust_remote_code)
        for line in calibration.audit_lines(built.audit):
            observer.note(line)
        job = job_of(found, built, data, device=device, trust_remote_code=trust_remote_code)
        observer.stage(f"recover: {checkpoint}")
        return recover(job, checkpoint, options, out, observer, partial(describe, job))


def source_of(checkpoint: Path) -> str:
    """The float model that a checkpoint was made of, as its own files tell.

    Raises:
        CheckpointError: they do not tell, or it is not there.
    """
    try:
        told = read_json(checkpoint / STAGE_FILE)["made_from"]["source"]["reference"]
    except (OSError, ValueError, KeyError, TypeError):
        told = None
    if isinstance(told, str) and (Path(told).expanduser().exists() or HUB_REFERENCE.fullmatch(told) is not None):
        return told
    raise CheckpointError(
        f"{checkpoint} does not tell where the float model lies that it was made of", "name it: --source ./my-model"
    )


def _strange(checkpoint: Path, model: SourceModel) -> list[str]:
    """What is to be said where the float model is another than the one that a checkpoint was made of."""
    told = (read_manifest(checkpoint) or {}).get("source", {})
    sha256 = told.get("sha256") if isinstance(told, Mapping) else None
    if not sha256 or sha256 == dict(sorted(model.sha256.items())):
        return []
    return [
        f"warning: {model.reference} is not the very model that {checkpoint} was made of, and is what it learns from"
    ]


def recover_row(
    current: Run,
    job: Job,
    variant: RecoverSpec,
    original: Mapping[str, Any],
    baseline: Baseline,
    write_card: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Train another variant's checkpoint and score the result; whatever goes wrong becomes its row.

    Args:
        current: the run.
        job: the float model with the calibration set.
        variant: what is asked for.
        original: the row of the other variant.
        baseline: the figures of the float model.
        write_card: writes the model card from a row.
    """
    alike = ("format", "scheme", "bits", "group_size", "symmetric")
    row: dict[str, Any] = {
        "name": variant.name,
        "status": "ok",
        "error": None,
        "method": f"{original['method']}+{variant.chain}",
        **{key: original[key] for key in alike},
        "options": (variant.adapter or variant.options).model_dump(mode="json"),
        "original": variant.recover,
    }

    def work() -> dict[str, Any]:
        if original["status"] != "ok":
            raise QuantizationError(f"{variant.recover} failed, of which it is made", "mend that variant first")
        given = job if variant.data is None else _with_data(current, job, variant)
        out = current.variant_folder(variant.name)
        checkpoint, there = Path(original["checkpoint"]), (out / STAGE_FILE).exists()
        reads = (marker(job.source), marker(checkpoint))
        task = Task(recover_title(variant), given.device, reads=reads, outputs=(out,))
        done = current.do(task, partial(_trained, given, checkpoint, variant, out), there=lambda: there)
        scored = _scored(current, variant, done, baseline)
        write_card(row | scored)
        return scored

    return attempted(current, row, work)


def _trained(job: Job, checkpoint: Path, variant: RecoverSpec, out: Path, observer: Observer) -> Quantized:
    """Train it, wherever that is done."""
    if variant.adapter is None:
        return recover(job, checkpoint, variant.options, out, observer, partial(describe, job))
    return adapted(job, checkpoint, variant.adapter, variant.options, out, observer)


def _with_data(current: Run, job: Job, variant: RecoverSpec) -> Job:
    """The job with the rows of a variant's own data."""
    if variant.data is None:
        return job
    built = calibration.build(
        variant.data, job.source, current.folder / "data" / variant.name, trust_remote_code=job.trust_remote_code
    )
    for line in calibration.audit_lines(built.audit):
        current.observer.note(f"{variant.name}: {line}")
    return replace(job, rows=built.rows, images={}, calibration_sha256=built.sha256, audit=built.audit)


def _scored(current: Run, variant: RecoverSpec, done: Quantized, baseline: Baseline) -> dict[str, Any]:
    if done.reused:
        current.observer.note(f"{variant.name}: reused the finished checkpoint")
    scored = score_beside(current, variant.name, done.folder, identity(done.folder), baseline)
    told, figures = _first(current, variant), report_figures(scored)
    keys = ("bits_per_weight", "bits_per_weight_file", "share", "layers", "experts", "notes", "recovered")
    return {
        "checkpoint": str(done.folder),
        **{key: done.facts[key] for key in keys},
        **(figures if told is None else beside_measured(figures, scored, done.folder, told)),
        "seconds": {"quantize": done.facts["seconds"], "evaluate": scored["seconds"]},
    }


def _first(current: Run, variant: RecoverSpec) -> VariantSpec | None:
    """The variant that a training began with, by which its file is estimated; None where a library made that."""
    by_name = {each.name: each for each in current.recipe.variants}
    found: Any = variant
    while isinstance(found, RecoverSpec):
        found = by_name[found.recover]
    found = current.plain.get(found.name, found)
    return found if isinstance(found, VariantSpec) else None
