"""What a budget leaves to the units of a model, and the choice that keeps to it by the bytes of the real file.

Bits per weight are those of the units. A size is that of the files, and memory is what a server needs beside them, as
``quantkit estimate`` counts it, so that both say how many bytes the files may take. What lies around the units follows
from the file of their smallest choices, told to the byte; headers grow with choices of more tensors, so that a choice
counts with its share of them, and what comes of it is told to the byte once more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantkit.allocation.optimize import choose
from quantkit.allocation.table import Allocation, Unit
from quantkit.allocation.units import Model
from quantkit.errors import SchemeError
from quantkit.estimation.inference import served
from quantkit.estimation.use import Use
from quantkit.formats import FORMATS
from quantkit.recipe.mix_budget import MixBudget
from quantkit.recipe.mix_choices import FLOAT
from quantkit.recipe.mixing import AutoSpec
from quantkit.schemes.rounding import CACHES
from quantkit.system.units import UNITS, in_units

ENTRY = len('"":{"dtype":"F32","shape":[,],"data_offsets":[,]},')
"""Characters of a tensor of two dimensions in a header of safetensors, beside its name and numbers."""


def room_of(model: Model, spec: AutoSpec, units: Sequence[Unit]) -> int:
    """Bytes that a budget leaves to the units.

    Of a file, choices with more tensors than the smallest take more for its header; :func:`chosen_within` minds that.

    Args:
        model: what is chosen for.
        spec: the variant, with its budget.
        units: of the model, see :func:`quantkit.allocation.units.units_of`; their costs do not count.

    Raises:
        SchemeError: it is less than the smallest choices take, with the least budget that they can meet.
        SourceError: memory is asked for, and transformers does not build the model.
    """
    budget, least = spec.budget, sum(min(unit.sizes.values()) for unit in units)
    if budget is None:
        raise SchemeError(f"{spec.name}: there is no budget to choose by", "give one, such as budget: 4.0")
    if budget.bits_per_weight is not None:
        varying = FORMATS.get(spec.format).varies * sum(len(unit.layers) for unit in units)
        weights = sum(unit.weights for unit in units)
        room = math.floor(budget.bits_per_weight * weights / 8) - varying
        if room < least:
            found = math.ceil(800 * (least + varying) / weights) / 100
            raise _too_small(spec, budget, f"{found:.2f} bits per weight", f"budget: {found:.2f}")
        return room
    smallest = _file_bytes(model, spec, units, _smallest(units))
    beside = 0 if budget.memory is None else _beside(model, spec, budget.context)
    given = budget.size or budget.memory or 0
    if given < smallest + beside:
        size, words = _size(smallest + beside), in_units(smallest + beside)
        if budget.memory is None:
            raise _too_small(spec, budget, f"{words} as a file", f"budget: {size}")
        told = f"budget: {{memory: {size}, context: {budget.context}}}"
        raise _too_small(spec, budget, f"{words}, {in_units(beside)} of it beside the file", told)
    return given - beside - smallest + least


def check_budget(model: Model, spec: AutoSpec, units: Sequence[Unit]) -> int:
    """Bytes that a budget leaves to the units, so that there is something to choose.

    Args:
        model: what is chosen for.
        spec: the variant, with its budget.
        units: of the model; their costs do not count.

    Raises:
        SchemeError: it is too small, see :func:`room_of`, or so large that every layer stays as it is.
        SourceError: see there.
    """
    room = room_of(model, spec, units)
    left = [unit.sizes.get(FLOAT) for unit in units]
    whole = sum(each for each in left if each is not None)
    if spec.budget is not None and None not in left and whole <= room:
        raise SchemeError(
            f"{spec.name}: {spec.budget.describe()} is enough for every layer as it is, so that none is quantized",
            "ship the model itself, or write a smaller budget, or leave float out of choices",
        )
    return room


def chosen_within(model: Model, spec: AutoSpec, units: Sequence[Unit]) -> tuple[str, ...]:
    """The choice for each unit of least cost with which the file keeps to the budget.

    Args:
        model: what is chosen for.
        spec: the variant, with its budget.
        units: of the model, with their costs.

    Raises:
        SchemeError: see :func:`room_of`.
        SourceError: see there.
    """
    room = room_of(model, spec, units)
    if spec.budget is not None and spec.budget.bits_per_weight is not None:
        return choose(units, room)
    smallest = _smallest(units)
    base = _file_bytes(model, spec, units, smallest)
    limit = base + room - _bytes(units, smallest)
    counted = [_with_headers(model, spec, unit, limit) for unit in units]
    least = _bytes(counted, tuple(min(unit.sizes, key=unit.sizes.__getitem__) for unit in counted))
    room = limit - base + _bytes(counted, smallest)
    while room >= least:
        chosen = choose(counted, room)
        excess = _file_bytes(model, spec, units, chosen) - limit
        if excess <= 0:
            return chosen
        room -= excess
    return smallest


def allocated(
    model: Model, spec: AutoSpec, units: Sequence[Unit], chosen: Sequence[str], facts: Mapping[str, Any] | None = None
) -> Allocation:
    """A choice for the units as what :meth:`AutoSpec.with_choice` takes.

    Args:
        model: what is chosen for.
        spec: the variant.
        units: of the model.
        chosen: a name for each of them.
        facts: what else there is to say of it.
    """
    choices = {name: patch.model_dump(exclude_none=True) for name, patch in spec.choice_patches().items()}
    places = {"embedding": model.embedding, "head": model.head}
    return Allocation(choices, units, tuple(chosen), {**(facts or {}), **places})


def _too_small(spec: AutoSpec, budget: MixBudget, least: str, remedy: str) -> SchemeError:
    return SchemeError(
        f"{spec.name}: {budget.describe()} cannot be met, as the smallest choices take {least}",
        f"write {remedy}, or add smaller choices",
    )


def _size(nbytes: int) -> str:
    """Bytes as a recipe may give them, rounded up in the third digit after the point."""
    for unit in ("GiB", "MiB", "KiB"):
        if nbytes >= UNITS[unit]:
            return f"{math.ceil(1000 * nbytes / UNITS[unit]) / 1000:g}{unit}"
    return f"{nbytes}B"


def _beside(model: Model, spec: AutoSpec, context: int) -> int:
    """Bytes that a server needs beside the files, for one sequence of so many tokens."""
    llama_cpp = FORMATS.get(spec.format).container == "gguf"
    cached = None if spec.kv_cache is None else CACHES[spec.kv_cache].numbers
    return served(model.anatomy, 0, Use(context=context, kv_dtype=cached), llama_cpp=llama_cpp).nbytes


def _file_bytes(model: Model, spec: AutoSpec, units: Sequence[Unit], chosen: Sequence[str]) -> int:
    return model.file_bytes(spec.with_choice(allocated(model, spec, units, chosen)))


def _smallest(units: Sequence[Unit]) -> tuple[str, ...]:
    return tuple(min(unit.sizes, key=unit.sizes.__getitem__) for unit in units)


def _bytes(units: Sequence[Unit], chosen: Sequence[str]) -> int:
    return sum(unit.sizes[name] for unit, name in zip(units, chosen, strict=True))


def _with_headers(model: Model, spec: AutoSpec, unit: Unit, largest: int) -> Unit:
    """A unit whose sizes have what a file says of its layers in them.

    Args:
        model: that it is of.
        spec: the variant.
        unit: of the model.
        largest: bytes of the file.
    """
    schemes, store = spec.choice_schemes(), FORMATS.get(spec.format)(model.dtype)
    sizes = {}
    for name, size in unit.sizes.items():
        scheme, sizes[name] = schemes[name], size
        for layer in unit.layers:
            if scheme is None:
                shapes: list[tuple[str, tuple[int, ...]]] = [(".weight", model.parts[layer].shape)]
            else:
                packing = store.for_embeddings() if layer == model.embedding else store
                found = packing.packed_shapes(scheme, *model.parts[layer].shape)
                shapes = [(f".{suffix}", shape) for suffix, (_, shape) in found.items()]
            if store.container == "safetensors":
                offsets = 2 * len(str(largest))
                sizes[name] += sum(ENTRY + len(layer + each + str(shape)) + offsets for each, shape in shapes)
            elif scheme is not None:
                sizes[name] += len(json.dumps({layer: scheme.to_json()}))
    return replace(unit, sizes=sizes)
