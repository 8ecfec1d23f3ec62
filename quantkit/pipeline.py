"""A run: from a recipe to a report, stage by stage, each reused where its result is already there."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quantkit import calibration, report, source
from quantkit.artifacts import (
    check_writable,
    file_sha256,
    new_folder,
    read_json,
    read_stage,
    translated_os_errors,
    write_json,
    write_stage,
)
from quantkit.calibration import CalibrationSet
from quantkit.checkpoint import CheckpointReader
from quantkit.environment import describe
from quantkit.errors import QuantkitError
from quantkit.evaluation import EvaluationJob, run_job
from quantkit.methods import METHODS
from quantkit.progress import Observer
from quantkit.quantize import Job, Quantized, quantize
from quantkit.recipe import EvaluationSpec, Recipe, VariantSpec

if TYPE_CHECKING:
    from quantkit.source import SourceModel

EVALUATION_VERSION = 1
"""Part of the fingerprint: raised when the same checkpoint and texts would give other figures."""
RESULT = "result.json"
LOGPROBS = "logprobs"


@dataclass(frozen=True, slots=True)
class Run:
    """A run in progress: what its stages share.

    Attributes:
        recipe: what was asked for.
        folder: where everything of the run lies.
        observer: is told what happens.
    """

    recipe: Recipe
    folder: Path
    observer: Observer

    def variant_folder(self, name: str) -> Path:
        """The checkpoint of a variant."""
        return self.folder / "variants" / name

    def log(self, name: str) -> Path:
        """A log file."""
        return self.folder / "logs" / f"{name}.log"


def run(recipe: Recipe, observer: Observer) -> dict[str, Any]:
    """Run a recipe and write its report.

    A variant that fails becomes a row of the report that says why; the others go on.

    Returns:
        The content of ``report.json``; its ``status`` is ``failed`` if a variant or a gate failed.

    Raises:
        QuantkitError: the model, the calibration set or the baseline cannot be had, so that no variant can run.
    """
    current = Run(recipe, recipe.folder, observer)
    with translated_os_errors(current.folder):
        current.folder.mkdir(parents=True, exist_ok=True)
    for variant in recipe.variants:
        check_writable(current.variant_folder(variant.name))
    observer.stage(f"source: {recipe.model.source}")
    model = source.resolve(recipe.model, current.folder)
    calibrated = _calibrate(current, model)
    observer.stage("baseline: the float model")
    baseline = _evaluate(current, "baseline", model.folder, model.made_from(), reference=None)
    job = quantize_job(recipe, model, calibrated)
    rows = [_variant_row(current, job, variant, baseline) for variant in recipe.variants]
    content = _report(current, model, calibrated, baseline, rows)
    report.write(content, current.folder, recipe.report.formats)
    return content


def quantize_job(recipe: Recipe, model: SourceModel, calibrated: CalibrationSet | None) -> Job:
    """What all variants of a recipe are quantized from."""
    return Job(
        source=model.folder,
        source_facts={"reference": model.reference, "relative_to": model.relative_to, **model.made_from()},
        dtype=model.dtype,
        rows=calibrated.rows if calibrated else (),
        calibration_sha256=calibrated.sha256 if calibrated else None,
        feed=recipe.calibration.inputs,
        device=recipe.evaluation.device,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def needs_calibration(recipe: Recipe) -> bool:
    """Whether any variant's method asks for statistics."""
    return any(METHODS.get(variant.method).needs for variant in recipe.variants)


def _calibrate(current: Run, model: SourceModel) -> CalibrationSet | None:
    if not needs_calibration(current.recipe):
        return None
    spec = current.recipe.calibration
    current.observer.stage(f"calibration: {spec.dataset}")
    found = calibration.build(
        spec, model.folder, current.folder / "calibration", trust_remote_code=current.recipe.model.trust_remote_code
    )
    for warning in found.audit["warnings"]:
        current.observer.note(f"calibration: {warning}")
    return found


def _variant_row(current: Run, job: Job, variant: VariantSpec, baseline: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": variant.name,
        "status": "ok",
        "error": None,
        "method": variant.method,
        "format": variant.format,
        "bits": variant.bits,
        "group_size": variant.group_size,
        "symmetric": variant.symmetric,
        "options": variant.method_options().model_dump(mode="json"),
    }
    # The one place that takes any error: a variant that fails must not take the others down. What is not a
    # QuantkitError is a bug or a lack of memory, so its traceback is kept.
    try:
        return row | _quantized_and_scored(current, job, variant, baseline)
    except QuantkitError as error:
        failure = str(error)
    except Exception as error:
        path = current.log(f"{variant.name}-traceback")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        failure = f"{type(error).__name__}: {error} (unexpected: the traceback is in {path})"
    current.observer.note(f"{variant.name} failed: {failure}")
    return row | {"status": "failed", "error": failure}


def _quantized_and_scored(current: Run, job: Job, variant: VariantSpec, baseline: dict[str, Any]) -> dict[str, Any]:
    out = current.variant_folder(variant.name)
    current.observer.stage(f"quantize: {variant.name}")
    done = quantize(job, variant, out, on_segment=partial(current.observer.progress, "block"))
    if done.reused:
        current.observer.note(f"{variant.name}: reused the finished checkpoint")
    current.observer.stage(f"evaluate: {variant.name}")
    identity = {"checkpoint": file_sha256(out / "manifest.json"), "reference": baseline["fingerprint"]}
    scored = _evaluate(current, variant.name, out, identity, reference=current.folder / "baseline" / LOGPROBS)
    return {
        **_quantize_facts(done),
        **_scores(scored),
        "seconds": {"quantize": done.facts["seconds"], "evaluate": scored["seconds"]},
    }


def _quantize_facts(done: Quantized) -> dict[str, Any]:
    facts = done.facts
    return {
        "checkpoint": str(done.folder),
        "bits_per_weight": facts["bits_per_weight"],
        "layers": facts["layers"],
        "notes": facts["notes"],
    }


def _evaluate(
    current: Run, name: str, checkpoint: Path, identity: dict[str, Any], reference: Path | None
) -> dict[str, Any]:
    """Score a checkpoint in a fresh process, or reuse its result; without a ``reference``, write the baseline's."""
    spec = current.recipe.evaluation
    out = current.folder / "baseline" if reference is None else current.folder / "evaluations" / name
    made_from = {"code": EVALUATION_VERSION, "spec": evaluation_identity(spec), "checkpoint": identity}
    finished = read_stage(out, "evaluate", made_from)
    if finished is not None:
        current.observer.note(f"{name}: reused the finished evaluation")
        return {**read_json(out / RESULT), "fingerprint": finished["fingerprint"]}
    compares = {"kl_divergence", "top1_agreement"} & set(spec.metrics)
    with new_folder(out) as folder:
        job = EvaluationJob(
            checkpoint=checkpoint,
            spec=spec,
            reference=(folder / LOGPROBS if reference is None else reference) if compares else None,
            writes_reference=reference is None and bool(compares),
            trust_remote_code=current.recipe.model.trust_remote_code,
        )
        result = run_job(job, log=current.log(name), on_progress=current.observer.progress)
        write_json(folder / RESULT, result)
        mark = write_stage(folder, "evaluate", made_from)
    return {**result, "fingerprint": mark}


def evaluation_identity(spec: EvaluationSpec) -> dict[str, Any]:
    """What the figures of a checkpoint depend on beside it: settings, and the content of local texts."""
    files = {text.name: file_sha256(Path(text.file)) for text in spec.texts if text.file and Path(text.file).is_file()}
    return {"settings": spec.model_dump(mode="json"), "files": files}


def _scores(result: dict[str, Any]) -> dict[str, Any]:
    """A result as the report has it."""
    speed = result["speed"]
    return {
        "metrics": result["metrics"],
        "texts": result["texts"],
        "size_bytes": result["size_bytes"],
        "memory": result["memory"],
        "speed": speed
        and {
            "prefill_tokens_per_second": speed["prefill"]["tokens_per_second"],
            "decode_tokens_per_second": speed["decode"]["tokens_per_second"],
            **speed,
        },
    }


def _report(
    current: Run,
    model: SourceModel,
    calibrated: CalibrationSet | None,
    baseline: dict[str, Any],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    recipe = current.recipe
    gates = report.evaluate_gates(recipe.gates, rows)
    failed = any(row["status"] == "failed" for row in rows) or not all(gate["passed"] for gate in gates)
    return {
        "schema": 1,
        "name": recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "failed" if failed else "ok",
        "quantkit_version": version("quantkit"),
        "recipe": recipe.resolved(),
        "recipe_text": yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False),
        "source": _source_facts(model),
        "calibration": calibrated.audit if calibrated else None,
        "environment": describe(),
        "baseline": {**_scores(baseline), "seconds": {"evaluate": baseline["seconds"]}},
        "variants": rows,
        "gates": gates,
    }


def _source_facts(model: SourceModel) -> dict[str, Any]:
    reader = CheckpointReader(model.folder)
    return {
        "reference": model.reference,
        "kind": model.kind,
        "relative_to": model.relative_to,
        "dtype": model.dtype,
        "revision": model.revision,
        "parameters": sum(prod(reader.shape(name)) for name in reader.names()),
        "size_bytes": sum(reader.nbytes(name) for name in reader.names()),
    }
