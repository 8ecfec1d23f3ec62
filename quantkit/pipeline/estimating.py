"""What a mixed variant takes, before anything is measured: a mix that keeps to the budget, as a measured one will."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.allocation.budget import allocated, check_budget, chosen_within
from quantkit.allocation.table import Allocation, Unit
from quantkit.allocation.units import AnatomyModel, units_of
from quantkit.estimation import Estimate
from quantkit.estimation.estimate import of_variant, split
from quantkit.estimation.models import anatomy_of
from quantkit.recipe import AutoSpec, VariantSpec
from quantkit.system.validation import parse_section


def mixed_estimate(
    model: str,
    variant: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    dtype: str | None = None,
    train: bool = False,
    trust_remote_code: bool = False,
) -> Estimate:
    """What a mixed variant takes; see :func:`quantkit.estimation.estimate`.

    Which layers will get which choice is not known; each bit more is taken to leave a quarter of what a layer loses.

    Args:
        model: a name, a folder, or a hub id.
        variant: ``method``, ``scheme`` and ``format``.
        options: keys of a use, and further keys of the variant.
        dtype: of the float model.
        train: estimate QLoRA training too.
        trust_remote_code: run Python code that comes with the model in a folder.

    Raises:
        QuantkitError: there is no such model, the variant does not suit it, or nothing meets the budget.
    """
    use, keys = split(options)
    spec = parse_section(AutoSpec, {"name": "variant", **variant, **keys}, "estimate")
    anatomy = anatomy_of(model, trust_remote_code=trust_remote_code)
    known = AnatomyModel(anatomy, dtype)
    return of_variant(anatomy, _mix(spec, known), use, dtype=known.dtype, train=train)


def _mix(spec: AutoSpec, model: AnatomyModel) -> VariantSpec:
    if spec.allocation is not None:
        return spec.with_choice(Allocation.load(Path(spec.allocation).expanduser()))
    units = [replace(unit, costs=_costs(unit)) for unit in units_of(model, spec)]
    check_budget(model, spec, units)
    return spec.with_choice(allocated(model, spec, units, chosen_within(model, spec, units)))


def _costs(unit: Unit) -> dict[str, float]:
    return {name: unit.weights * 4.0 ** (-8 * size / max(1, unit.weights)) for name, size in unit.sizes.items()}
