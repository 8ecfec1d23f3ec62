"""Scales and zero points for a weight: from the range of each group, or by a weighted search."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quantkit.numerics.weighing import Weighing
from quantkit.schemes import QuantizedWeight, Scheme
from quantkit.schemes.grids import Grid, Grids

SEARCH_CHUNK = 1 << 18
"""Weights searched at a time: few enough for the caches, enough that threads seldom wait for each other."""


def range_grid(weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    """The grid that just spans each group's range, zero included: round-to-nearest's usual choice.

    Raises:
        QuantizationError: the grid reaches beyond what ``scale_dtype`` holds.
    """
    grids = scheme.grids()
    return grids.spanning(grids.grouped(weight), scale_dtype)


def encode(weight: torch.Tensor, grid: Grid, scheme: Scheme) -> torch.Tensor:
    """The nearest codes as uint8 ``[rows, columns]``."""
    grids = scheme.grids()
    return grids.ungrouped(grids.encode(grids.grouped(weight), grid), weight.shape)


def quantized(codes: torch.Tensor, grid: Grid, scheme: Scheme) -> QuantizedWeight:
    """Codes and grid as what formats take."""
    return QuantizedWeight(scheme, codes, grid.scales, scheme.grids().stored_zeros(grid), grid.parts)


def codes_of(levels: torch.Tensor, grid: Grid, scheme: Scheme) -> torch.Tensor:
    """Codes, uint8 ``[rows, columns]``, of levels float32 ``[columns, rows]``."""
    columns, rows = levels.shape
    grids = scheme.grids()
    return grids.codes(levels, grids.spread(grid.zeros, rows, columns)).T.contiguous()


def search_grid(
    weight: torch.Tensor,
    importance: torch.Tensor | None,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    candidates: int,
    *,
    negative_scales: bool = True,
) -> Grid:
    """The grid of least weighted square error among shrunken ranges, each with its best scale.

    For every candidate range the nearest levels ``q`` are taken. Where scales are free, the one of least squares
    for these levels is known in closed form, ``s = Σ h w q / Σ h q²``; it lowers the error by
    ``(Σ h w q)² / Σ h q²``, so the best candidate is the one where that is largest. Where they are not, the
    candidate's own scale lowers it by ``2 s Σ h w q - s² Σ h q²``.

    Args:
        weight: float32 ``[rows, columns]``.
        importance: ``h``, see :meth:`quantkit.numerics.weighing.Weighing.of`; with a Gram matrix ``H`` the sums above
            become ``w H q`` and ``q H q`` over the group.
        scheme: the grid.
        scale_dtype: dtype in which scales are stored.
        candidates: ranges tried per group.
        negative_scales: whether a symmetric integer grid may be turned over, so that the side on which it reaches
            one step further is that of the weight of largest magnitude.

    Raises:
        QuantizationError: the grid reaches beyond what ``scale_dtype`` holds.
    """
    grids = scheme.grids()
    groups = grids.grouped(weight)
    grids = grids.fitted(groups)
    weigh = Weighing.of(grids, importance, weight.shape[1], weight.device)
    step = (
        max(1, SEARCH_CHUNK // (groups.shape[1] * groups.shape[2])) if weight.device.type == "cpu" else groups.shape[0]
    )
    if not scheme.free_scales:
        tried = grids.candidates(groups, candidates, negative_scales=negative_scales)
        return grids.stored(*_search_stored(grids, groups, weigh, tried, step), scale_dtype)
    parts = [
        _search_free(grids, groups[start : start + step], weigh, candidates, negative_scales)
        for start in range(0, groups.shape[0], step)
    ]
    scales, zeros = (torch.cat(each) for each in zip(*parts, strict=True))
    return grids.stored(scales, zeros, scale_dtype)


def _search_free(
    grids: Grids, groups: torch.Tensor, weigh: Weighing, candidates: int, negative_scales: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale and zero of each group by itself."""
    weighted = weigh(groups)
    best_gain = torch.full(groups.shape[:2], -torch.inf, device=groups.device)
    best_scale = torch.zeros_like(best_gain)
    best_zero = torch.zeros_like(best_gain)
    for scale, zero in grids.candidates(groups, candidates, negative_scales=negative_scales):
        along, norm = _moments(grids, groups, weighted, weigh, scale, zero)
        gain = torch.where(norm > 0, along * along / norm, 0.0)
        better = torch.logical_not(gain <= best_gain)
        best_gain = torch.where(better, gain, best_gain)
        # A group that rounds to zero has no best scale; NaN is kept, for the grids to refuse.
        best_scale = torch.where(better, torch.where(norm == 0, 0.0, along / norm), best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _search_stored(
    grids: Grids,
    groups: torch.Tensor,
    weigh: Weighing,
    tried: Iterable[tuple[torch.Tensor, torch.Tensor]],
    step: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of the scales and zeros that are ``tried``, where groups that share a scale are judged together."""
    best_gain = torch.full(groups.shape[:2], -torch.inf, device=groups.device)
    best_scale = torch.zeros_like(best_gain)
    best_zero = torch.zeros_like(best_gain)
    for scales, zeros in tried:
        gains = []
        for start in range(0, groups.shape[0], step):
            part, scale, zero = (each[start : start + step] for each in (groups, scales, zeros))
            along, norm = _moments(grids, part, weigh(part), weigh, scale, zero)
            gains.append(2 * scale * along - scale.square() * norm)
        gain = grids.pooled(torch.cat(gains))
        better = torch.logical_not(gain <= best_gain)
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, scales, best_scale)
        best_zero = torch.where(better, zeros, best_zero)
    return best_scale, best_zero


def _moments(
    grids: Grids,
    groups: torch.Tensor,
    weighted: torch.Tensor,
    weigh: Weighing,
    scales: torch.Tensor,
    zeros: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``w H q`` and ``q H q`` of each group for its nearest levels ``q``."""
    levels = grids.nearest_(groups * (1 / scales).unsqueeze(-1), zeros)
    return (weighted * levels).sum(-1), weigh(levels).mul_(levels).sum(-1)
