"""A rehearsal: a whole run of the first blocks of a model with one batch, measured, and told for the whole run.

The blocks go up to the largest one. All that a run does is done: a pass backward where that is asked for, statistics,
each variant's method, packing, writing, reading back, training, and scoring of one window a text. What a stage took
beside what was expected of it tells what it will take in the whole run beside what is expected there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.checkpoint import CheckpointReader, ShardWriter
from quantkit.checkpoint.companions import copy_companions
from quantkit.engine.batches import BATCH_TOKENS
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import OutputError, QuantkitError
from quantkit.estimation.measured import known_anatomy
from quantkit.merging import merged_source
from quantkit.pipeline import quantize_job
from quantkit.pipeline.mixing import plain_or_like
from quantkit.pipeline.run import run
from quantkit.recipe import LibrarySpec, MergeSpec, ModelSpec, Recipe, RecoverSpec
from quantkit.recipe.outputs import BudgetSpec, HistorySpec, ReportSpec, TrackingSpec
from quantkit.system.artifacts import read_json, write_json, write_stage
from quantkit.system.devices import resolve_device
from quantkit.system.progress import Silent
from quantkit.system.scratch import folder_in
from quantkit.system.units import in_units

FEWEST_ROWS = 8
"""Calibration rows at least: some are held out."""
CONFIG = "config.json"
BARRED = "cannot run"
"""How a plan says that a variant cannot."""
Forecast = Callable[[Recipe], dict[str, Any]]


def rehearsed(recipe: Recipe, plan: Mapping[str, Any], forecast: Forecast) -> dict[str, Any]:
    """Rehearse a run in a scratch folder that is gone afterwards.

    Args:
        recipe: what will be run.
        plan: of it, as ``forecast`` tells it.
        forecast: :func:`quantkit.pipeline.plan.forecast`.

    Returns:
        ``blocks`` and ``of_blocks``; ``stages``, each with ``stage``, ``measured_bytes`` and ``estimated_bytes`` of the
        rehearsal, ``ratio``, ``seconds`` of it, and for the whole run ``whole_bytes`` and ``whole_seconds`` (None where
        nothing tells them); ``failures``, what went wrong by variant; ``left_out``, variants that were not tried.

    Raises:
        QuantkitError: nothing could be rehearsed.
    """
    model = merged_source(recipe.model, recipe.merge, recipe.folder, Silent())
    anatomy = known_anatomy(model.folder)
    if anatomy is None:
        raise QuantkitError(f"{model.reference} cannot be rehearsed", "transformers does not build it; run the recipe")
    blocks = min(anatomy.blocks, anatomy.largest + 1)
    with folder_in(recipe.max_memory.disk, "quantkit-rehearsal-") as scratch:
        source = cut(model.folder, scratch / "model", blocks, recipe.model.trust_remote_code)
        small, left_out = _small(recipe, model, source, scratch / "run")
        before = forecast(small)
        barred = [each["name"] for each in before["variants"] if str(each["state"]).startswith(BARRED)]
        left_out += barred  # they name blocks that are not there, or cannot run at all, as the plan says
        able = tuple(each for each in small.variants if each.name not in barred)
        if not able:
            raise QuantkitError(f"{', '.join(left_out)} cannot be rehearsed", "run the recipe")
        report = run(small.model_copy(update={"variants": able}), Silent(), installs=False)
    failures = {row["name"]: row["error"] for row in report["variants"] if row["status"] != "ok"}
    stages = [_scaled(each, plan, before) for each in report["stages"] if each["measured_bytes"]]
    return {
        "blocks": blocks,
        "of_blocks": anatomy.blocks,
        "stages": stages,
        "failures": failures,
        "left_out": left_out,
    }


def cut(model: Path, out: Path, blocks: int, trust_remote_code: bool = False) -> Path:
    """Write the first blocks of a float model as a model of its own, with all that lies around them.

    Args:
        model: its folder.
        out: of the new one.
        blocks: how many.
        trust_remote_code: run Python code that comes with it.

    Raises:
        OutputError: the disk has no room for them.
    """
    reader, skeleton = CheckpointReader(model), Skeleton(model, trust_remote_code)
    whole = len(skeleton.segments)
    gone: set[str] = set()
    for segment in skeleton.segments[blocks:]:
        for name, _ in segment.module.named_parameters():
            gone.update(skeleton.names.sources(f"{segment.prefix}.{name}"))
    kept = [name for name in reader.names() if name not in gone]
    needed = sum(reader.nbytes(name) for name in kept)
    out.mkdir(parents=True)
    if needed > shutil.disk_usage(out).free:
        raise OutputError(f"a rehearsal writes {in_units(needed)}, more than {out.parent} has", "set max_memory.disk")
    copy_companions(model, out)
    with ShardWriter(out) as writer:
        for name in kept:
            writer.declare(name, reader.dtype(name), reader.shape(name))
        for name in kept:
            writer.write(name, reader.read(name))
    write_json(out / CONFIG, _cut_config(read_json(model / CONFIG), whole, blocks))
    write_stage(out, "cut", {"blocks": blocks})
    return out


def _cut_config(config: Mapping[str, Any], whole: int, blocks: int) -> dict[str, Any]:
    """A config with fewer blocks: their number, and lists with an entry for each of them."""

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _cut_config(value, whole, blocks)
        if isinstance(value, list) and len(value) == whole:
            return value[:blocks]
        counts = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "max_window_layers")
        return blocks if key in counts and value == whole else value

    return {key: changed(key, value) for key, value in config.items()}


def _small(recipe: Recipe, model: Any, source: Path, folder: Path) -> tuple[Recipe, list[str]]:
    """The recipe of a rehearsal, and the variants that it leaves out."""
    job = quantize_job(recipe, model, None)
    variants: list[Any] = []
    left_out: list[str] = []
    for variant in recipe.variants:
        if isinstance(variant, LibrarySpec) or (isinstance(variant, RecoverSpec) and variant.recover in left_out):
            left_out.append(variant.name)
        elif isinstance(variant, RecoverSpec):
            variants.append(variant.model_copy(update={"steps": 1, "evaluations": 1}))
        else:
            variants.append(plain_or_like(job, variant, recipe.folder).model_copy(update={"name": variant.name}))
    if not variants:
        raise QuantkitError("all variants are made by libraries, which are not rehearsed", "run the recipe")
    device = resolve_device(recipe.quantization.device)
    calibration, spec = recipe.calibration, recipe.evaluation
    rows = max(FEWEST_ROWS, -(-BATCH_TOKENS[device.type] // calibration.max_length))
    evaluation = {
        "max_tokens": min(spec.max_tokens, spec.context_length),
        "tasks": (),
        "answers": None,
        "samples": None,
    }
    changes = {
        "model": ModelSpec(source=str(source), dtype="own", trust_remote_code=recipe.model.trust_remote_code),
        "merge": MergeSpec(),
        "calibration": calibration.model_copy(update={"samples": min(calibration.samples, rows)}),
        "variants": tuple(variants),
        "evaluation": spec.model_copy(update=evaluation),
        "report": ReportSpec(folder=str(folder), formats=("json",)),
        "history": HistorySpec(enabled=False),
        "tracking": TrackingSpec(),
        "budget": BudgetSpec(),
        "gates": (),
        "webhook": None,
    }
    return recipe.model_copy(update=changes), left_out


def _scaled(stage: Mapping[str, Any], plan: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage took, and what it will take in the whole run by what it took beside what was expected."""
    whole = {each["stage"]: each["bytes"] for each in plan["stages"]}.get(stage["stage"])
    expected, ahead = (_seconds(each, stage["stage"]) for each in (before, plan))
    took, ratio = stage["seconds"], stage["ratio"]
    return {
        "stage": stage["stage"],
        "measured_bytes": stage["measured_bytes"],
        "estimated_bytes": stage["estimated_bytes"],
        "ratio": ratio,
        "seconds": took,
        "whole_bytes": round(whole / ratio) if whole and ratio else None,
        "whole_seconds": ahead * took / expected if took and expected and ahead else None,
    }


def _seconds(plan: Mapping[str, Any], stage: str) -> float | None:
    """What a plan expects a stage to take; None where it says nothing of it."""
    stages: Sequence[Mapping[str, Any]] = (plan["time"] or {"stages": ()})["stages"]
    return next((float(each["seconds"]) for each in stages if each["stage"] == stage), None)
