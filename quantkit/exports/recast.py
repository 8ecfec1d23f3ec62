"""The same weight in the words of another scheme: where grids agree, only the way of telling them differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from quantkit.errors import SchemeError
from quantkit.formats.base import Format
from quantkit.schemes import IntScheme, QuantizedWeight, Scheme

SHIFT_ALLOWED = 0.1
"""How far a weight may move, in steps of its grid, where scales or minimums are stored in fewer bits."""


def target_scheme(scheme: Scheme, store: type[Format], shape: tuple[int, int]) -> Scheme:
    """The scheme in which a format stores the grid of another scheme.

    Raises:
        SchemeError: it stores none that has this grid; the reason is the format's own.
    """
    refusal: SchemeError | None = None
    for candidate in _same_grid(scheme):
        try:
            store.check(candidate)
            store.check_layer(candidate, *shape)
        except SchemeError as error:
            refusal = refusal or error
            continue
        return candidate
    if refusal is None:
        raise SchemeError(f"format {store.name} has no scheme for {scheme.describe()}")
    raise refusal


def recast(weight: QuantizedWeight, scheme: Scheme) -> QuantizedWeight:
    """The same codes and scales under a scheme of the same grid, as :func:`target_scheme` gives it."""
    if scheme == weight.scheme:
        return weight
    zeros = weight.zeros
    if isinstance(scheme, IntScheme) and scheme.zeros == "float":
        zeros = zeros.to(torch.float32)
    return replace(weight, scheme=scheme, zeros=zeros)


def with_scales_in(weight: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    """Scales that a dtype of 16 bits holds; they are the only part of a weight that this may move."""
    if weight.parts or weight.scales.dtype == dtype or not isinstance(weight.scheme, IntScheme):
        return weight
    return replace(weight, scales=weight.scales.to(dtype))


def shift(before: QuantizedWeight, after: QuantizedWeight) -> float:
    """The farthest that a weight moved, in steps of its grid."""
    moved = (after.dequantize(torch.float32) - before.dequantize(torch.float32)).abs()
    if not moved.any():
        return 0.0
    unit = replace(before, codes=torch.ones_like(before.codes), zeros=torch.zeros_like(before.zeros))
    steps = unit.dequantize(torch.float32).abs()
    return float((moved / steps.clamp_(min=torch.finfo(torch.float32).tiny)).max())


def _same_grid(scheme: Scheme) -> Iterator[Scheme]:
    """The scheme itself, and others that can tell the same values."""
    yield scheme
    if isinstance(scheme, IntScheme):
        if scheme.symmetric:
            yield replace(scheme, symmetric=False)
        if scheme.zeros == "int" and not scheme.desc_act:
            yield replace(scheme, symmetric=False, zeros="float")
