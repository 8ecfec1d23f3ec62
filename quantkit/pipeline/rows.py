"""The rows of a report: each variant quantized and scored, or the reason why it was not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.estimation.measured import beside_measured
from quantkit.evaluation.stage import report_figures
from quantkit.exports.manifest import identity
from quantkit.merging import other_merge
from quantkit.methods.tuning import TUNE
from quantkit.pipeline.context import Baseline, Run, attempted, marker, score_beside
from quantkit.pipeline.library_rows import library_row
from quantkit.pipeline.mixing import Mixed, mixed_all, mixed_scheme
from quantkit.pipeline.parting import parted, unknown_seconds
from quantkit.pipeline.recovering import recover_row
from quantkit.pipeline.titles import walk_title
from quantkit.pipeline.workers import HERE, Task
from quantkit.publishing import CARD, CardFacts, card, describe
from quantkit.quantization import Job, Quantized, Wanted, quantize_together, walks
from quantkit.quantization.job import finished_variant, made_from
from quantkit.recipe import AutoSpec, LibrarySpec, VariantSpec
from quantkit.schemes.base import PER_CHANNEL
from quantkit.system.artifacts import write_text
from quantkit.system.progress import Observer


def variant_rows(current: Run, job: Job, baseline: Baseline, audit: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Quantize walk by walk, then library by library, score what each gives; rows are in the order of the recipe."""
    own = current.recipe.own_variants
    card_of = partial(write_scored_card, job, baseline, audit)
    rows: dict[str, dict[str, Any]] = {}
    specs = {variant.name: variant for variant in own}
    mixes = _mixed(current, job, own)
    made = {name: mix for name, mix in mixes.items() if isinstance(mix, Mixed)}
    current = replace(current, plain={name: mix.variant for name, mix in made.items()})
    for variant in own:
        failure = mixes.get(variant.name)
        if isinstance(failure, Exception):
            rows[variant.name] = _variant_row(current, variant, failure, baseline, card_of, _mixed_row(variant))
    variants = [current.plain.get(variant.name, variant) for variant in own if variant.name not in rows]

    def walked(places: Sequence[int], whole: Sequence[int]) -> list[dict[str, Any]]:
        specs_here = [variants[place] for place in places]
        memory = current.needs.get(walk_title([variants[place] for place in whole]), 0)
        outcomes = _quantized(current, job, specs_here, made, memory)
        jobs = [
            partial(_variant_row, current, spec, outcome, baseline, card_of, _mixed_row(specs[spec.name], made))
            for spec, outcome in zip(specs_here, outcomes, strict=True)
        ]
        return current.workers.each(jobs)

    def by_library(other: LibrarySpec) -> list[dict[str, Any]]:
        return [library_row(current, job, other, baseline, card_of)]

    together = walks(job, variants)
    jobs = [
        partial(walked, part, places)
        for places in together
        for part in _dealt(current, variants, places, len(together))
    ]
    jobs += [partial(by_library, each) for each in current.recipe.library_variants]
    for found in current.workers.each(jobs):
        rows |= {row["name"]: row for row in found}
    for trained in current.recipe.recover_variants:
        rows[trained.name] = recover_row(current, job, trained, rows[trained.recover], baseline, card_of)
    return [rows[each.name] for each in current.recipe.variants]


def _dealt(current: Run, variants: Sequence[VariantSpec], places: Sequence[int], count: int) -> list[list[int]]:
    """The parts of one of so many walks, where workers can do more at a time than there are walks."""
    workers, takes = max(1, current.workers.parallel // count), current.takes
    if takes is None:
        return parted(places, variants, workers, unknown_seconds)
    scored = takes.scoring(current.recipe.evaluation) * (len(variants) + 1) / count
    return parted(places, variants, workers, takes.walk, scored)


def _mixed(current: Run, job: Job, own: Sequence[VariantSpec]) -> dict[str, Mixed | Exception]:
    """What each mixed variant became."""
    if current.workers is HERE or not any(isinstance(each, AutoSpec) for each in own):
        return mixed_all(job, own, current.folder, current.observer)
    names = ", ".join(each.name for each in own if isinstance(each, AutoSpec))
    task = Task(f"bits: {names}", job.device, reads=(marker(job.source),))
    return current.do(task, partial(mixed_all, job, own, current.folder))


def write_scored_card(job: Job, baseline: Baseline, audit: dict[str, Any] | None, row: dict[str, Any]) -> None:
    """Write the measured figures into the model card of a checkpoint, where they are not there yet."""
    file = Path(row["checkpoint"]) / CARD
    facts = replace(
        CardFacts.of(job, file.parent.name), scores=row, baseline=report_figures(baseline()), calibration=audit
    )
    text = card(file.parent, facts)
    if not file.is_file() or file.read_bytes() != text.encode():
        write_text(file, text)


def _quantized(
    current: Run, job: Job, variants: list[VariantSpec], mixes: Mapping[str, Mixed], memory: int
) -> list[Quantized | Exception]:
    """The outcome of each variant of a walk that takes so much memory; what stops the whole walk is that of all."""
    beside = {name: mix.documents() for name, mix in mixes.items()}
    wanted = [Wanted(each, current.variant_folder(each.name), beside.get(each.name, {})) for each in variants]
    try:
        task = Task(
            walk_title(variants),
            job.device,
            job.devices,
            memory,
            reads=(marker(job.source),),
            outputs=tuple(each.out for each in wanted),
        )
        return current.do(task, partial(_walk, job, wanted), there=partial(_all_there, job, wanted))
    except Exception as error:  # methods and formats are plugins; any error becomes the rows of these variants
        return [error] * len(variants)


def _walk(job: Job, wanted: Sequence[Wanted], observer: Observer) -> list[Quantized | Exception]:
    """A walk, wherever it is done."""
    return quantize_together(
        job,
        wanted,
        describe=partial(describe, job),
        on_segment=partial(observer.progress, "block"),
        on_note=observer.note,
    )


def _variant_row(
    current: Run,
    variant: VariantSpec,
    outcome: Quantized | Exception,
    baseline: Baseline,
    write_card: Callable[[dict[str, Any]], None],
    mixed: Mapping[str, Any],
) -> dict[str, Any]:
    scheme = variant.base_scheme()
    row: dict[str, Any] = {
        "name": variant.name,
        "status": "ok",
        "error": None,
        "method": variant.chain,
        "format": variant.format,
        "scheme": scheme.describe(),
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "options": {**variant.method_options().model_dump(mode="json"), **_tune_options(variant)},
        **mixed,
    }

    def work() -> dict[str, Any]:
        if isinstance(outcome, Exception):
            raise outcome
        scored = _scored(current, variant, outcome, baseline)
        write_card(scored)
        return scored

    return attempted(current, row, work)


def _all_there(job: Job, wanted: Sequence[Wanted]) -> bool:
    return all(finished_variant(each.out, made_from(job, each.variant)) is not None for each in wanted)


def _mixed_row(spec: VariantSpec, mixes: Mapping[str, Mixed] | None = None) -> dict[str, Any]:
    """What the row of a mixed variant says of its schemes, and of what was chosen; nothing of any other."""
    if not isinstance(spec, AutoSpec):
        return {}
    found = {} if mixes is None else {"allocation": mixes[spec.name].allocation.to_json()}
    return {"scheme": mixed_scheme(spec), "bits": None, "group_size": None, "symmetric": None, **found}


def _tune_options(variant: VariantSpec) -> dict[str, Any]:
    return {} if variant.tune is None else {TUNE: variant.tune.model_dump(mode="json")}


def _scored(current: Run, variant: VariantSpec, done: Quantized, baseline: Baseline) -> dict[str, Any]:
    if done.reused:
        current.observer.note(f"{variant.name}: reused the finished checkpoint")
    scored = score_beside(current, variant.name, done.folder, identity(done.folder), baseline)
    return {
        **_quantize_facts(done),
        **beside_measured(report_figures(scored), scored, done.folder, variant),
        "seconds": {"quantize": done.facts["seconds"], "evaluate": scored["seconds"]},
    }


def _quantize_facts(done: Quantized) -> dict[str, Any]:
    facts = done.facts
    return {
        "checkpoint": str(done.folder),
        "bits_per_weight": facts["bits_per_weight"],
        "bits_per_weight_file": facts["bits_per_weight_file"],
        "share": facts["share"],
        "layers": facts["layers"],
        **({"tuning": facts["tuning"]} if "tuning" in facts else {}),
        "experts": facts["experts"],
        "notes": facts["notes"],
    }


def other_merge_rows(current: Run, baseline: Baseline) -> list[dict[str, Any]]:
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
    return [attempted(current, row, partial(_other_merge, current, row["name"], baseline))]


def _other_merge(current: Run, name: str, baseline: Baseline) -> dict[str, Any]:
    recipe = current.recipe
    model = other_merge(recipe.model, recipe.merge, current.folder, current.observer)
    scored = score_beside(current, name, model.folder, model.made_from(), baseline)
    bits = 8 * getattr(torch, model.dtype).itemsize
    return {
        "scheme": model.dtype,
        "bits": bits,
        "checkpoint": str(model.folder),
        "bits_per_weight": float(bits),
        "layers": [],
        "experts": [],
        "notes": list(model.merge["notes"]),
        **beside_measured(report_figures(scored), scored, model.folder),
        "seconds": {"quantize": 0.0, "evaluate": scored["seconds"]},
    }
