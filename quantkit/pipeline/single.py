"""One checkpoint without a recipe: what ``quantkit quantize`` does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from quantkit import calibration
from quantkit.merging import merged_source
from quantkit.pipeline import job_of
from quantkit.pipeline.jobs import with_sensitivity
from quantkit.pipeline.mixing import Measured, mixed
from quantkit.pipeline.titles import mixing_title
from quantkit.publishing import describe
from quantkit.quantization import quantize
from quantkit.quantization.expert_tokens import expert_line
from quantkit.quantization.job import STAGE
from quantkit.recipe import AutoSpec, Recipe
from quantkit.system.artifacts import check_writable
from quantkit.system.progress import Observer
from quantkit.system.scratch import workplace


def quantize_one(recipe: Recipe, out: Path, observer: Observer) -> Path:
    """Quantize the only variant of a recipe into ``out``; source and calibration lie in a folder beside it meanwhile.

    Raises:
        QuantkitError: with what is wrong and the remedy.
    """
    model, spec, where = recipe.model, recipe.calibration, recipe.quantization
    (variant,) = recipe.own_variants
    check_writable(out, stage=STAGE, source=model.source)
    with workplace(out, "quantize") as scratch:
        observer.stage(f"source: {model.source}")
        found = merged_source(model, recipe.merge, scratch, observer)
        calibrated = None
        if variant.calibrated:
            observer.stage(f"calibration: {spec.dataset}")
            trusted = model.trust_remote_code
            calibrated = calibration.build(spec, found.folder, scratch / "calibration", trust_remote_code=trusted)
            for line in calibration.audit_lines(calibrated.audit):
                observer.note(line)
        trusted = model.trust_remote_code
        job = job_of(found, calibrated, spec, device=where.first, devices=where.devices, trust_remote_code=trusted)
        on_segment = partial(observer.progress, "block")

        def note(text: str) -> None:
            observer.note(text.removeprefix(f"{variant.name}: "))  # there is no other variant

        documents = {}
        if isinstance(variant, AutoSpec):
            observer.stage(mixing_title([variant]))
            made = mixed(job, variant, scratch, Measured(job, scratch, observer))
            observer.note(made.line())
            variant, documents = made.variant, made.documents()
        job = with_sensitivity(job, spec, scratch / "sensitivity", observer)
        observer.stage(f"quantize: {variant.chain}")
        done = quantize(
            job,
            variant,
            out,
            describe=partial(describe, job),
            documents=documents,
            on_segment=on_segment,
            on_note=note,
        )
        for table in done.facts["experts"]:
            observer.note(expert_line(table))
        return done.folder
