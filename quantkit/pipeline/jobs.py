"""The job of quantizing: the float model and the calibration rows that all variants of a recipe start from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.calibration import CalibrationSet
from quantkit.engine.routing import ExpertSettings
from quantkit.quantization import Job
from quantkit.quantization.sensitivity import sensitivity
from quantkit.recipe import CalibrationSpec, Recipe
from quantkit.system.memory_bounds import NO_BOUNDS, MemoryBounds
from quantkit.system.progress import Observer

if TYPE_CHECKING:
    from quantkit.source import SourceModel
    from quantkit.system.devices import Devices


def quantize_job(recipe: Recipe, model: SourceModel, calibrated: CalibrationSet | None) -> Job:
    """What all variants of a recipe are quantized from."""
    return job_of(
        model,
        calibrated,
        recipe.calibration,
        device=recipe.quantization.first,
        devices=recipe.quantization.devices,
        trust_remote_code=recipe.model.trust_remote_code,
        bounds=recipe.max_memory,
    )


def job_of(
    model: SourceModel,
    calibrated: CalibrationSet | None,
    spec: CalibrationSpec,
    *,
    device: str = "auto",
    devices: Devices = None,
    trust_remote_code: bool = False,
    bounds: MemoryBounds = NO_BOUNDS,
) -> Job:
    """What is quantized: a float model, and the calibration set where a method needs one, used as ``spec`` says."""
    return Job(
        source=model.folder,
        source_facts={"reference": model.reference, "relative_to": model.relative_to, **model.made_from()},
        dtype=model.dtype,
        rows=calibrated.rows if calibrated else (),
        images=calibrated.inputs if calibrated else {},
        calibration_sha256=calibrated.sha256 if calibrated else None,
        audit=calibrated.audit if calibrated else None,
        inputs=spec.inputs,
        generated=spec.generated,
        experts=ExpertSettings(spec.experts, spec.expert_prior),
        device=device,
        devices=devices,
        trust_remote_code=trust_remote_code,
        bounds=bounds,
        hub=(model.reference, model.revision) if model.kind == "hub" else None,
    )


def with_sensitivity(job: Job, spec: CalibrationSpec, folder: Path, observer: Observer) -> Job:
    """The job with what the model is sensitive to, found out in ``folder``, where the recipe asks for it."""
    if not spec.wants_sensitivity or not job.rows:
        return job
    observer.stage("sensitivity")
    known = sensitivity(job, folder, on_segment=partial(observer.progress, "block"), on_note=observer.note)
    return replace(job, sensitivity=replace(known, token_weights=spec.token_weights))


def needs_calibration(recipe: Recipe) -> bool:
    """Whether any variant's method asks for statistics."""
    return any(variant.calibrated for variant in recipe.variants)
