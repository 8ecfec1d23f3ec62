"""A run: from a recipe to a report, stage by stage, each reused where its result is already there."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit import calibration, report
from quantkit.artifacts import check_writable, translated_os_errors, write_text
from quantkit.calibration import CalibrationSet
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.walk import Feed
from quantkit.environment import describe
from quantkit.errors import OutputError, QuantkitError
from quantkit.estimation.beside import beside_measured
from quantkit.exports.manifest import identity
from quantkit.merging import MergedModel, merged_source, other_merge
from quantkit.progress import Observer
from quantkit.publishing import CARD, card
from quantkit.quantization import Job, Quantized, Wanted, card_facts, quantize_together, walks
from quantkit.recipe import Recipe, VariantSpec
from quantkit.schemes.base import PER_CHANNEL
from quantkit.scores import LOGPROBS, Scoring, report_figures, score

if TYPE_CHECKING:
    from quantkit.source import SourceModel


NAMES_SHOWN = 3
"""Variants of a walk that its progress names."""


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

    @property
    def baseline(self) -> Path:
        """The figures and log-probabilities of the float model."""
        return self.folder / "baseline"

    def variant_folder(self, name: str) -> Path:
        """The checkpoint of a variant."""
        return self.folder / "variants" / name

    def log(self, kind: str, name: str = "") -> Path:
        """A log file of some kind, of a variant or of the whole run."""
        return self.folder / "logs" / (f"{kind}-{name}.log" if name else f"{kind}.log")


def run(recipe: Recipe, observer: Observer) -> dict[str, Any]:
    """Run a recipe and write its report.

    A variant that fails becomes a row of the report that says why; the others go on.

    Returns:
        The content of ``report.json``; its ``status`` is ``failed`` if a variant or a gate failed.

    Raises:
        QuantkitError: the model, the calibration set or the baseline cannot be had, so that no variant can run.
    """
    current = Run(recipe, recipe.folder, observer)
    _check_folders(current)
    for warning in recipe.warnings():
        observer.note(f"warning: {warning}")
    observer.stage(f"source: {recipe.model.source}")
    model = merged_source(recipe.model, recipe.merge, current.folder, observer)
    calibrated = _calibrate(current, model)
    baseline = _baseline(current, model)
    job = quantize_job(recipe, model, calibrated)
    rows = _other_merge_rows(current, baseline)
    rows += _variant_rows(current, job, baseline, calibrated.audit if calibrated else None)
    content = _report(current, model, calibrated, baseline, rows)
    report.write(content, current.folder, recipe.report.formats)
    return content


def _check_folders(current: Run) -> None:
    """Find out before any work whether all that the run will write can be written."""
    folder = current.folder
    if folder.is_file():
        raise OutputError(f"{folder} exists and is not a folder", "set report.folder to another one")
    check_writable(current.baseline)
    for variant in current.recipe.variants:
        check_writable(current.variant_folder(variant.name))
    with translated_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def quantize_job(recipe: Recipe, model: SourceModel, calibrated: CalibrationSet | None) -> Job:
    """What all variants of a recipe are quantized from."""
    return job_of(
        model,
        calibrated,
        recipe.calibration.inputs,
        device=recipe.evaluation.device,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def job_of(
    model: SourceModel,
    calibrated: CalibrationSet | None,
    feed: Feed,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Job:
    """What is quantized: a float model, and the calibration set where a method needs one."""
    return Job(
        source=model.folder,
        source_facts={"reference": model.reference, "relative_to": model.relative_to, **model.made_from()},
        dtype=model.dtype,
        rows=calibrated.rows if calibrated else (),
        calibration_sha256=calibrated.sha256 if calibrated else None,
        feed=feed,
        device=device,
        trust_remote_code=trust_remote_code,
        hub=(model.reference, model.revision) if model.kind == "hub" else None,
    )


def needs_calibration(recipe: Recipe) -> bool:
    """Whether any variant's method asks for statistics."""
    return any(variant.build_method().needs for variant in recipe.variants)


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


def _baseline(current: Run, model: SourceModel) -> dict[str, Any]:
    """The figures of the float model; its weights are checked before they are run for the first time."""
    current.observer.stage("baseline: the float model")
    scoring = Scoring(
        "baseline",
        model.folder,
        model.made_from(),
        current.recipe.evaluation,
        current.baseline,
        current.log("baseline"),
        trust_remote_code=current.recipe.model.trust_remote_code,
    )
    if scoring.finished() is None:
        reader = CheckpointReader(model.folder)
        for name in reader.names():
            reader.read_finite(name)
    return score(scoring, current.observer)


def _variant_rows(
    current: Run, job: Job, baseline: dict[str, Any], audit: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Quantize walk by walk, score what each gives, and return the rows in the order of the recipe."""
    variants = current.recipe.variants
    rows: dict[int, dict[str, Any]] = {}
    for places in walks(job, variants):
        outcomes = _quantized(current, job, [variants[place] for place in places])
        for place, outcome in zip(places, outcomes, strict=True):
            card_of = partial(_write_card, job, report_figures(baseline), audit)
            rows[place] = _variant_row(current, variants[place], outcome, baseline, card_of)
    return [rows[place] for place in sorted(rows)]


def _write_card(job: Job, before: dict[str, Any], audit: dict[str, Any] | None, row: dict[str, Any]) -> None:
    """Write the measured figures into the model card of a checkpoint, where they are not there yet."""
    file = Path(row["checkpoint"]) / CARD
    facts = replace(card_facts(job), scores=row, baseline=before, calibration=audit, repository=file.parent.name)
    text = card(file.parent, facts)
    if not file.is_file() or file.read_bytes() != text.encode():
        write_text(file, text)


def _other_merge_rows(current: Run, baseline: dict[str, Any]) -> list[dict[str, Any]]:
    """The row of the float model merged into the other base, where the recipe asks for one to compare with."""
    merge = current.recipe.merge
    if merge.compare is None:
        return []
    row: dict[str, Any] = {
        "name": f"merged-{merge.compare}",
        "status": "ok",
        "error": None,
        "method": "none",
        "format": "float",
        "group_size": PER_CHANNEL,
        "symmetric": True,
        "options": {},
    }
    return [_attempted(current, row, partial(_other_merge, current, row["name"], baseline))]


def _other_merge(current: Run, name: str, baseline: dict[str, Any]) -> dict[str, Any]:
    recipe = current.recipe
    model = other_merge(recipe.model, recipe.merge, current.folder, current.observer)
    scored = _score(current, name, model.folder, model.made_from(), baseline)
    bits = 8 * getattr(torch, model.dtype).itemsize
    return {
        "scheme": model.dtype,
        "bits": bits,
        "checkpoint": str(model.folder),
        "bits_per_weight": float(bits),
        "layers": [],
        "notes": list(model.merge["notes"]),
        **report_figures(scored),
        "seconds": {"quantize": 0.0, "evaluate": scored["seconds"]},
    }


def _quantized(current: Run, job: Job, variants: list[VariantSpec]) -> list[Quantized | Exception]:
    """The outcome of each variant of a walk; what stops the whole walk is that of all."""
    names = ", ".join(variant.name for variant in variants[:NAMES_SHOWN])
    rest = len(variants) - NAMES_SHOWN
    current.observer.stage(f"quantize: {names} and {rest} more" if rest > 0 else f"quantize: {names}")
    wanted = [Wanted(variant, current.variant_folder(variant.name)) for variant in variants]
    try:
        return quantize_together(job, wanted, on_segment=partial(current.observer.progress, "block"))
    except Exception as error:
        return [error] * len(variants)


def _variant_row(
    current: Run,
    variant: VariantSpec,
    outcome: Quantized | Exception,
    baseline: dict[str, Any],
    write_card: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    scheme = variant.base_scheme()
    row: dict[str, Any] = {
        "name": variant.name,
        "status": "ok",
        "error": None,
        "method": variant.method,
        "format": variant.format,
        "scheme": scheme.describe(),
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "options": variant.method_options().model_dump(mode="json"),
    }

    def work() -> dict[str, Any]:
        if isinstance(outcome, Exception):
            raise outcome
        scored = _scored(current, variant, outcome, baseline)
        write_card(scored)
        return scored

    return _attempted(current, row, work)


def _attempted(current: Run, row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row with what ``work`` adds, or with the reason why it failed."""
    name = row["name"]
    # A variant that fails must not take the others down, so any error becomes its row. What is not a
    # QuantkitError is a bug or a lack of memory, so its traceback is kept.
    try:
        return row | work()
    except QuantkitError as error:
        failure = str(error)
    except Exception as error:
        path = current.log("traceback", name)
        write_text(path, "".join(traceback.format_exception(error)))
        failure = f"{type(error).__name__}: {error} (unexpected: the traceback is in {path})"
    current.observer.note(f"{name} failed: {failure}")
    return row | {"status": "failed", "error": failure}


def _scored(current: Run, variant: VariantSpec, done: Quantized, baseline: dict[str, Any]) -> dict[str, Any]:
    if done.reused:
        current.observer.note(f"{variant.name}: reused the finished checkpoint")
    scored = _score(current, variant.name, done.folder, identity(done.folder), baseline)
    return {
        **_quantize_facts(done),
        **beside_measured(report_figures(scored), scored, done.folder, variant),
        "seconds": {"quantize": done.facts["seconds"], "evaluate": scored["seconds"]},
    }


def _score(current: Run, name: str, folder: Path, content: Any, baseline: dict[str, Any]) -> dict[str, Any]:
    """Score a checkpoint, known by its ``content``, beside the baseline."""
    current.observer.stage(f"evaluate: {name}")
    scoring = Scoring(
        name,
        folder,
        {"checkpoint": content, "reference": baseline["fingerprint"]},
        current.recipe.evaluation,
        current.folder / "evaluations" / name,
        current.log("evaluate", name),
        current.baseline / LOGPROBS,
        current.recipe.model.trust_remote_code,
    )
    return score(scoring, current.observer)


def _quantize_facts(done: Quantized) -> dict[str, Any]:
    facts = done.facts
    return {
        "checkpoint": str(done.folder),
        "bits_per_weight": facts["bits_per_weight"],
        "layers": facts["layers"],
        "notes": facts["notes"],
    }


def _report(
    current: Run,
    model: SourceModel,
    calibrated: CalibrationSet | None,
    baseline: dict[str, Any],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    recipe = current.recipe
    variants = {variant.name for variant in recipe.variants}
    gates = report.evaluate_gates(recipe.gates, [row for row in rows if row["name"] in variants])
    failed = any(row["status"] == "failed" for row in rows) or not all(gate["passed"] for gate in gates)
    return {
        "schema": 1,
        "name": recipe.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "failed" if failed else "ok",
        "quantkit_version": version("quantkit"),
        "recipe": recipe.resolved(),
        "recipe_text": recipe.to_yaml(),
        "source": _source_facts(model),
        "calibration": calibrated.audit if calibrated else None,
        "environment": describe(),
        "baseline": {**report_figures(baseline), "seconds": {"evaluate": baseline["seconds"]}},
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
        "merge": model.merge if isinstance(model, MergedModel) else None,
    }
