"""Mixed variants: where ``bits: auto`` becomes a choice for each layer, before anything is quantized.

What choices cost is measured once for all variants that differ in their budgets alone. The choice lies in the folder of
the run, as ``allocations/NAME.json``, and goes along with the checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.allocation.budget import allocated, check_budget, chosen_within
from quantkit.allocation.measuring import measured
from quantkit.allocation.table import ALLOCATION, Allocation, Unit
from quantkit.allocation.units import CheckpointModel, units_of
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import OutputError, QuantkitError, RecipeError, did_you_mean
from quantkit.pipeline.titles import mixing_title
from quantkit.quantization import Job
from quantkit.quantization.plan import plan_layers
from quantkit.quantization.variant import check_model
from quantkit.recipe import AutoSpec, VariantSpec
from quantkit.system.artifacts import fingerprint
from quantkit.system.progress import Observer

COSTS, ALLOCATIONS = "costs", "allocations"
"""Folders of a run: what choices cost, and what was chosen."""
CODE_VERSION = 1
"""Part of what an allocation is known by: raised when the same costs would give another choice."""
NOT_MEASURED = ("name", "title", "budget", "strict", "allow_float", "allocation", "runtime")
"""Keys of a variant that change nothing of what choices cost."""
COLUMNS = 4096
"""Of a layer by which choices are put in order of their bits."""
MADE = "made_from"
"""The fact of an allocation by which it is known again."""


@dataclass(frozen=True, slots=True)
class Mixed:
    """A mixed variant whose layers have their choices.

    Attributes:
        variant: as people would write it, with overrides.
        allocation: the choices.
    """

    variant: VariantSpec
    allocation: Allocation

    def documents(self) -> dict[str, Any]:
        """What goes along with the checkpoint."""
        return {ALLOCATION: self.allocation.to_json()}

    def line(self) -> str:
        """What was chosen, such as ``3.98 bits per weight: 12 layers int3, 80 int4; predicted KL divergence 0.021``."""
        found = self.allocation
        counts: Counter[str] = Counter()
        for unit, name in zip(found.units, found.chosen, strict=True):
            counts[name] += len(unit.layers)
        names = [name for name in found.choices if counts[name]]
        told = [f"{counts[name]} {'layers ' if place == 0 else ''}{name}" for place, name in enumerate(names)]
        words = f"{found.bits_per_weight:.2f} bits per weight: {', '.join(told)}"
        return f"{words}; predicted KL divergence {found.predicted:.2g}"


def mixed_all(
    job: Job, variants: Sequence[VariantSpec], folder: Path, observer: Observer
) -> dict[str, Mixed | Exception]:
    """A choice for every layer of all mixed variants among some, by name; see :func:`mixed_alike`."""
    found: dict[str, Mixed | Exception] = {}
    for group in measured_alike(variants):
        found |= mixed_alike(job, group, folder, observer)
    return found


def mixed_alike(job: Job, specs: Sequence[AutoSpec], folder: Path, observer: Observer) -> dict[str, Mixed | Exception]:
    """A choice for every layer of variants that differ in their budgets, or in what does not change costs.

    Args:
        job: what is quantized.
        specs: the variants.
        folder: of the run.
        observer: is told what happens.

    Returns:
        By name what came of each; of one that fails why.
    """
    observer.stage(mixing_title(specs))
    found: dict[str, Mixed | Exception] = {}
    costs = Measured(job, folder, observer)
    for spec in specs:
        try:
            made = mixed(job, spec, folder, costs)
            observer.note(f"{spec.name}: {made.line()}")
            found[spec.name] = made
        except Exception as error:  # methods and formats are plugins; any error becomes the row of the variant
            found[spec.name] = error
    return found


class Measured:
    """What choices cost, by variants that share a measurement, which is not tried again once it has failed.

    Args:
        job: what is measured.
        folder: of the run.
        observer: is told what happens.
    """

    def __init__(self, job: Job, folder: Path, observer: Observer) -> None:
        self.job, self.folder, self.observer = job, folder, observer
        self._failure: Exception | None = None

    def of(self, spec: AutoSpec, units: Sequence[Unit]) -> list[Unit]:
        """Units with their costs.

        Raises:
            QuantkitError: see :func:`quantkit.allocation.measuring.measured`; the same for each variant.
        """
        if self._failure is not None:
            raise self._failure
        progress, place = partial(self.observer.progress, "block"), costs_folder(spec, self.folder)
        try:
            return measured(self.job, spec, units, place, on_segment=progress, on_note=self.observer.note)
        except Exception as error:  # whatever it is, it is that of each variant
            self._failure = error
            raise


def mixed(job: Job, spec: AutoSpec, folder: Path, costs: Measured) -> Mixed:
    """A choice for every layer of a variant: given back, made by an earlier run, or measured and made.

    Args:
        job: what is quantized.
        spec: the variant.
        folder: of the run.
        costs: of the variants that it shares a measurement with.

    Raises:
        RecipeError: an allocation that is given back does not suit the model.
        SchemeError: the budget is less than the smallest choices take, with the least that can be met; no choice
            suits a layer.
        OutputError: somebody changed the allocation in the run's folder; it cannot be written.
        QuantkitError: costs cannot be measured.
    """
    file = folder / ALLOCATIONS / f"{spec.name}.json"
    known = known_choice(job, spec, folder)
    if known is not None:
        return known
    skeleton = Skeleton(job.source, job.trust_remote_code)
    skeleton.check_blocks()
    if spec.allocation is not None:
        made = given_back(job, spec, skeleton)
    else:
        found = _chosen(job, spec, CheckpointModel(job, skeleton), costs)
        made = Mixed(spec.with_choice(found), found)
    made.allocation.save(file)
    return made


def given_back(job: Job, spec: AutoSpec, skeleton: Skeleton) -> Mixed:
    """The choice of a file, which may have been edited.

    Raises:
        RecipeError: it is none, or does not suit the model.
    """
    model = CheckpointModel(job, skeleton)
    found = _given_back(spec, model)
    made = Mixed(spec.with_choice(found), found)
    _check_whole(made, spec, model)
    return made


def known_choice(job: Job, spec: AutoSpec, folder: Path) -> Mixed | None:
    """The choice that an earlier run made for the same variant, model and calibration set; None where there is none.

    Raises:
        OutputError: somebody has changed it there.
    """
    file = folder / ALLOCATIONS / f"{spec.name}.json"
    if spec.allocation is not None or not file.exists():
        return None
    found = Allocation.load(file)
    told = found.facts.get(MADE)
    if not isinstance(told, Mapping) or told.get("chosen") != fingerprint(list(found.chosen)):
        raise OutputError(
            f"{file} was changed, and quantkit writes it",
            "move it and give it back with allocation: FILE; or delete it",
        )
    return Mixed(spec.with_choice(found), found) if told.get("inputs") == _inputs(job, spec) else None


def costs_folder(spec: AutoSpec, folder: Path) -> Path:
    """Where what the choices of a variant cost lies in a run's folder, with others that differ in their budgets."""
    return folder / COSTS / _measured_by(spec)[:8]


def measured_alike(variants: Sequence[VariantSpec]) -> list[list[AutoSpec]]:
    """The mixed variants among some in groups that share a measurement."""
    groups: dict[str, list[AutoSpec]] = {}
    for each in variants:
        if isinstance(each, AutoSpec):
            groups.setdefault(_measured_by(each), []).append(each)
    return list(groups.values())


def _measured_by(spec: AutoSpec) -> str:
    told = {key: value for key, value in spec.resolved().items() if key not in NOT_MEASURED}
    return fingerprint({**told, "allocation": spec.allocation})


def _inputs(job: Job, spec: AutoSpec) -> str:
    """What a choice depends on."""
    told = {key: value for key, value in spec.resolved().items() if key not in ("name", "title")}
    return fingerprint([CODE_VERSION, told, job.source_facts, job.dtype, job.calibration_sha256])


def _chosen(job: Job, spec: AutoSpec, model: CheckpointModel, costs: Measured) -> Allocation:
    """The choice of least loss within the budget, from what choices are measured to cost."""
    units = units_of(model, spec)
    check_budget(model, spec, units)  # before anything is measured
    check_model(job, model.skeleton, spec)
    costed = costs.of(spec, units)
    chosen = chosen_within(model, spec, costed)
    facts = {
        "budget": None if spec.budget is None else spec.budget.describe(),
        "method": spec.chain,
        "format": spec.format,
        MADE: {"inputs": _inputs(job, spec), "chosen": fingerprint(list(chosen))},
    }
    return allocated(model, spec, costed, chosen, facts)


def _given_back(spec: AutoSpec, model: CheckpointModel) -> Allocation:
    """The allocation of a file, which may have been edited."""
    found = Allocation.load(Path(str(spec.allocation)).expanduser())
    for unit in found.units:
        for layer in unit.layers:
            if layer not in model.parts:
                raise RecipeError(
                    f"{spec.allocation}: the model has no layer '{layer}'", did_you_mean(layer, model.parts)
                )
    facts = {key: value for key, value in found.facts.items() if key != MADE}
    return replace(found, facts={**facts, "embedding": model.embedding, "head": model.head})


def _check_whole(made: Mixed, spec: AutoSpec, model: CheckpointModel) -> None:
    """Refuse an allocation that says nothing of a layer which would be quantized.

    Raises:
        RecipeError: with the layer.
    """
    told = {layer for unit in made.allocation.units for layer in unit.layers}
    for layer in plan_layers(model.skeleton, made.variant).quantized:
        part = model.parts.get(layer)
        if part is None or layer in told or not spec.takes_part(layer, part.block, model.blocks, part.path):
            continue
        problem = f"{spec.allocation} has no choice for '{layer}'"
        raise RecipeError(problem, "give one, or name the layer in ignore or overrides")


@dataclass(frozen=True, slots=True)
class Prospect:
    """What the file of a mixed variant may take, before anything is measured.

    Attributes:
        least, most: bytes of the file where every layer gets its smallest choice, or its largest.
        wanted: bytes that the budget leaves, the most that it makes use of.
        layers: that are chosen for.
        smallest: the variant whose layers get their smallest choices.
    """

    least: int
    most: int
    wanted: int
    layers: int
    smallest: VariantSpec


def prospect(job: Job, spec: AutoSpec, skeleton: Skeleton) -> Prospect:
    """What the file of a mixed variant may take.

    Raises:
        SchemeError: the budget is less than the smallest choices take; no choice suits a layer.
    """
    model = CheckpointModel(job, skeleton)
    units = units_of(model, spec)
    room = check_budget(model, spec, units)
    smallest = tuple(min(unit.sizes, key=unit.sizes.__getitem__) for unit in units)
    variant = spec.with_choice(allocated(model, spec, units, smallest))
    file = model.file_bytes(variant)
    least = sum(min(unit.sizes.values()) for unit in units)
    most = sum(max(unit.sizes.values()) for unit in units)
    layers = sum(len(unit.layers) for unit in units)
    return Prospect(file, file + most - least, file + min(room, most) - least, layers, variant)


def plain_or_like(job: Job, spec: VariantSpec, folder: Path) -> VariantSpec:
    """What a mixed variant became in an earlier run, or one of about its work; any other variant as it is."""
    if not isinstance(spec, AutoSpec):
        return spec
    try:
        known = known_choice(job, spec, folder)
    except QuantkitError:
        known = None  # the run tells what is wrong with it
    return spec.stand_in() if known is None else known.variant


def mixed_scheme(spec: AutoSpec) -> str:
    """What stands for the scheme of a mixed variant: its choices from fewest to most bits, ``int2 to int8, mixed``."""
    bits = {
        name: 16.0 if each is None else each.bits_per_weight(COLUMNS) for name, each in spec.choice_schemes().items()
    }
    names = sorted((name for name in bits if bits[name] < 16), key=lambda name: bits[name])
    if not names:
        return "mixed"
    return f"{names[0]} to {names[-1]}, mixed" if len(names) > 1 else f"{names[0]} and float, mixed"
