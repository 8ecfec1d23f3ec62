"""Scales and zero points: from the range of a group, or by a weighted search.

Weights come grouped, ``[rows, groups, columns_per_group]``; scales and zeros are ``[rows, groups]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch

from quantkit.errors import QuantizationError
from quantkit.numerics.host import decide
from quantkit.schemes import IntScheme, QuantizedWeight

SEARCH_CHUNK = 1 << 18
"""Weights searched at a time: few enough for the caches, enough that threads seldom wait for each other."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales in the dtype in which they are stored, and zeros as float32 whole numbers; ``[rows, groups]``."""

    scales: torch.Tensor
    zeros: torch.Tensor


def grouped(weight: torch.Tensor, scheme: IntScheme) -> torch.Tensor:
    """View ``[rows, columns]`` as ``[rows, groups, columns_per_group]``."""
    rows, columns = weight.shape
    return weight.view(rows, scheme.groups(columns), scheme.columns_per_group(columns))


def range_grid(weight: torch.Tensor, scheme: IntScheme, scale_dtype: torch.dtype) -> Grid:
    """The grid that just spans each group's range, zero included: round-to-nearest's usual choice.

    Symmetric: ``scale = 2 max|w| / (2**bits - 1)``; asymmetric: ``(max - min) / (2**bits - 1)``. These are
    the formulas of compressed-tensors' ``calculate_qparams``, so that its quantizer gives the same grid.

    Raises:
        QuantizationError: the grid reaches beyond what ``scale_dtype`` holds.
    """
    parts = grouped(weight, scheme)
    low = parts.amin(-1).clamp_(max=0)
    high = parts.amax(-1).clamp_(min=0)
    if scheme.symmetric:
        scales = stored(torch.maximum(-low, high) / ((scheme.levels - 1) / 2), scale_dtype)
        return held(Grid(scales, torch.full_like(low, scheme.zero)), scheme)
    scales = stored((high - low) / (scheme.levels - 1), scale_dtype)
    # The sum is taken of signed zeros, as compressed-tensors does, so that near ties round alike.
    zeros = (-scheme.zero - low / scales.float()).round_().add_(scheme.zero).clamp_(0, scheme.levels - 1)
    return held(Grid(scales, zeros), scheme)


def stored(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales rounded to the dtype in which they are stored; where they vanish, the smallest number to divide by.

    A group of zeros has scale zero, and one of tiny weights may underflow to it; dividing by it must not
    give NaN. float16 keeps its subnormal numbers, which an 8-bit scale needs as soon as a group stays below
    0.008; those of the other dtypes are subnormal in float32 too, where hardware may flush them to zero.
    """
    rounded = scales.to(dtype)
    info = torch.finfo(dtype)
    least = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)
    return torch.where(rounded.abs() < least, least, rounded)


def held(grid: Grid, scheme: IntScheme) -> Grid:
    """The grid itself, if the dtype of its scales holds every value on it.

    Raises:
        QuantizationError: it does not, so that a runtime would compute infinities.
    """
    reach = torch.maximum(grid.zeros, (scheme.levels - 1) - grid.zeros) * grid.scales.float().abs()
    largest = torch.finfo(grid.scales.dtype).max
    if not decide((reach <= largest).all()):
        name = str(grid.scales.dtype).removeprefix("torch.")
        raise QuantizationError(
            f"a weight is not finite or needs a scale beyond the range of {name} (its largest value is {largest:g})",
            "set model.dtype to bfloat16 or float32, whose scales reach further" if name == "float16" else "",
        )
    return grid


def spread(values: torch.Tensor, columns: int) -> torch.Tensor:
    """``[rows, groups]`` to ``[columns, rows]``: the value of each weight, transposed."""
    return values.T.repeat_interleave(columns // values.shape[1], dim=0)


@dataclass(frozen=True, slots=True)
class Limits:
    """Lowest and highest step, ``code - zero``, of each weight of a transposed layer.

    A symmetric scheme has the same for all; an asymmetric one has float32 ``[columns, rows]``.
    """

    low: torch.Tensor | int
    high: torch.Tensor | int

    @classmethod
    def of(cls, grid: Grid, scheme: IntScheme, columns: int) -> Limits:
        """The limits of a layer with ``columns`` input columns."""
        if scheme.symmetric:
            return cls(-scheme.zero, scheme.levels - 1 - scheme.zero)
        zeros = spread(grid.zeros, columns)
        return cls(-zeros, (scheme.levels - 1) - zeros)

    def columns(self) -> Iterator[tuple[Any, Any]]:
        """The limits of each column in turn."""
        low = self.low.unbind(0) if isinstance(self.low, torch.Tensor) else repeat(self.low)
        high = self.high.unbind(0) if isinstance(self.high, torch.Tensor) else repeat(self.high)
        return zip(low, high, strict=False)

    def ordered(self, order: torch.Tensor) -> Limits:
        """The limits with the columns in another order."""
        if isinstance(self.low, torch.Tensor) and isinstance(self.high, torch.Tensor):
            return Limits(self.low[order], self.high[order])
        return self


def codes_of(steps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes, uint8 ``[rows, columns]``, of whole steps float32 ``[columns, rows]``."""
    return (steps + spread(grid.zeros, steps.shape[0])).to(torch.uint8).T.contiguous()


def encode(weight: torch.Tensor, grid: Grid, scheme: IntScheme) -> torch.Tensor:
    """The nearest codes as uint8 ``[rows, columns]``; of two equally near the even one.

    The zero is added as a signed number, as compressed-tensors does, so that near ties round as there.
    """
    parts = grouped(weight, scheme)
    codes = (parts / grid.scales.float().unsqueeze(-1)).add_((grid.zeros - scheme.zero).unsqueeze(-1))
    codes = codes.round_().add_(scheme.zero).clamp_(0, scheme.levels - 1)
    return codes.to(torch.uint8).view(weight.shape)


def quantized(codes: torch.Tensor, grid: Grid, scheme: IntScheme) -> QuantizedWeight:
    """Pack codes and grid into what formats take."""
    return QuantizedWeight(scheme, codes, grid.scales, grid.zeros.to(torch.uint8))


def search_grid(
    weight: torch.Tensor,
    importance: torch.Tensor | None,
    scheme: IntScheme,
    scale_dtype: torch.dtype,
    candidates: int,
    *,
    negative_scales: bool = True,
) -> Grid:
    """The grid of least weighted square error among shrunken ranges, each with its best scale.

    For every candidate range the codes are rounded, and for these codes the scale of least squares is
    known in closed form, ``s = Σ h w q / Σ h q²`` with ``q = code - zero``; it lowers the error by
    ``(Σ h w q)² / Σ h q²``, so the best candidate is the one where that is largest.

    Args:
        weight: float32 ``[rows, columns]``.
        importance: ``h``, float32 ``[columns]`` such as the mean square of each input; None weighs all alike,
            and so does a group of zeros.
        scheme: the grid.
        scale_dtype: dtype in which scales are stored.
        candidates: ranges tried per group.
        negative_scales: whether a symmetric grid may be turned over, so that the side on which it reaches one step
            further is that of the weight of largest magnitude.

    Raises:
        QuantizationError: the grid reaches beyond what ``scale_dtype`` holds.
    """
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    heights = torch.ones(columns, device=weight.device) if importance is None else importance.float()
    heights = heights.view(1, groups, -1)
    heights = torch.where(heights.amax(-1, keepdim=True) > 0, heights, 1.0)
    step = max(1, SEARCH_CHUNK // columns) if weight.device.type == "cpu" else rows
    parts = [
        _search(grouped(weight[start : start + step], scheme), heights, scheme, candidates, negative_scales)
        for start in range(0, rows, step)
    ]
    scales = stored(torch.cat([scales for scales, _ in parts]), scale_dtype)
    return held(Grid(scales, torch.cat([zeros for _, zeros in parts])), scheme)


def _search(
    parts: torch.Tensor, heights: torch.Tensor, scheme: IntScheme, candidates: int, negative_scales: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    weighted = parts * heights
    best_gain = torch.full(parts.shape[:2], -1.0, device=parts.device)
    best_scale = torch.zeros_like(best_gain)
    best_zero = torch.full_like(best_gain, scheme.zero)
    for scale, zero in _candidates(parts, scheme, candidates, negative_scales):
        codes = (parts * (1 / scale).unsqueeze(-1)).round_()
        codes = codes.clamp_((-zero).unsqueeze(-1), (scheme.levels - 1 - zero).unsqueeze(-1))
        along = (weighted * codes).sum(-1)
        norm = (codes.square_() * heights).sum(-1)
        gain = torch.where(norm > 0, along * along / norm, 0.0)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        # A group that rounds to zero has no best scale; NaN is kept, for the caller to refuse.
        best_scale = torch.where(better, torch.where(norm == 0, 0.0, along / norm), best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _candidates(
    parts: torch.Tensor, scheme: IntScheme, count: int, negative_scales: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scales and zeros of ranges from the full one down; narrower for fewer bits, which clip more."""
    narrowest = {2: 0.45, 3: 0.6, 4: 0.7, 8: 0.96}[scheme.bits]
    shrinks = [1 - (1 - narrowest) * index / max(1, count - 1) for index in range(count)]
    tiny = 4 * torch.finfo(torch.float32).tiny  # the narrowest candidate is then a normal number still
    if scheme.symmetric:
        low, high = parts.amin(-1), parts.amax(-1)
        zero = torch.full_like(low, scheme.zero)
        if negative_scales:
            full = -torch.where(-low >= high, low, high) / scheme.zero
        else:
            full = torch.maximum(-low / scheme.zero, high / (scheme.zero - 1))
        full = torch.where(full.abs() < tiny, tiny, full)
        return [(full * shrink, zero) for shrink in shrinks]
    low = parts.amin(-1).clamp_(max=0)
    high = parts.amax(-1).clamp_(min=0)
    found = []
    for shrink in shrinks:
        scale = ((high - low) * (shrink / (scheme.levels - 1))).clamp_(min=tiny)
        zero = (-low * shrink / scale).round_().clamp_(0, scheme.levels - 1)
        found.append((scale, zero))
    return found
