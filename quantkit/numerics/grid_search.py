"""Scales and zero points for a weight: from the range of each group, or by a weighted search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from quantkit.numerics.weighing import Weighing
from quantkit.schemes import QuantizedWeight, Scheme
from quantkit.schemes.grids import Grid, Grids

Candidate = tuple[torch.Tensor, torch.Tensor]
"""Scales and zeros to try, each ``[A, G]``."""

SEARCH_CHUNK = 1 << 18
"""Weights searched at a time: few enough for the caches, enough that threads seldom wait for each other."""

FARTHEST_FIT = 0.4
"""How far the scale of least error for a candidate's levels may be from the candidate's own, as a share of it."""


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
    candidate's own scale lowers it by ``2 s Σ h w q - s² Σ h q²``. With correlations ``s`` may be far from the
    candidate, and its codes quite other than ``q``: then both scales are judged as they would be stored, see
    :func:`_search_judged`.

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
    own = grids.searched(groups, weigh, candidates)
    if own is not None:
        return own
    rows, per_row = groups.shape[0], groups.shape[1] * groups.shape[2]
    step = max(1, SEARCH_CHUNK // per_row) if weight.device.type == "cpu" else rows
    if not scheme.free_scales:
        tried = grids.candidates(groups, candidates, negative_scales=negative_scales)
        return grids.stored(*_search_stored(grids, groups, weigh, tried, step), scale_dtype)
    parts = []
    for part in torch.split(groups, step):
        tried = grids.candidates(part, candidates, negative_scales=negative_scales)
        if weigh.blocks is None:
            parts.append(_search_free(grids, part, weigh, tried))
        else:
            parts.append(_search_judged(grids, part, weigh, tried, scale_dtype))
    scales, zeros = (torch.cat(each) for each in zip(*parts, strict=True))
    return grids.stored(scales, zeros, scale_dtype)


@dataclass(slots=True)
class _Best:
    """What of the scales and zeros tried is best of each group, ``[A, G]``; ``worth`` is less the better."""

    worth: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @classmethod
    def of(cls, groups: torch.Tensor) -> _Best:
        """Nothing was tried."""
        worth = torch.full(groups.shape[:2], torch.inf, device=groups.device)
        return cls(worth, torch.zeros_like(worth), torch.zeros_like(worth))

    def take(self, better: torch.Tensor, worth: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
        """Another candidate where it is ``better``."""
        self.worth = torch.where(better, worth, self.worth)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)

    def then(self, tried: Sequence[Candidate], grids: Grids) -> Iterator[Candidate]:
        """What is tried, and then, if there was a choice, the neighbours of what is best by then."""
        yield from tried
        if len(tried) > 1:
            yield from grids.neighbours(self.scales, self.zeros)


def _search_free(
    grids: Grids, groups: torch.Tensor, weigh: Weighing, tried: Sequence[Candidate]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale and zero of each group by itself."""
    weighted, best = weigh(groups), _Best.of(groups)
    for scale, zero in best.then(tried, grids):
        along, norm = _moments(grids, groups, weighted, weigh, scale, zero)
        loss = torch.where(norm > 0, -along * along / norm, 0.0)
        # A group that rounds to zero has no best scale; NaN is kept, for the grids to refuse.
        best.take(torch.logical_not(loss >= best.worth), loss, torch.where(norm == 0, 0.0, along / norm), zero)
    return best.scales, best.zeros


def _search_judged(
    grids: Grids, groups: torch.Tensor, weigh: Weighing, tried: Sequence[Candidate], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero of each group whose weights, coded and decoded, come out with the least weighted error.

    The range that rounding to nearest would take is tried too, so that no group comes out worse than by that. The
    scale that suits a candidate's levels best is tried where it is within ``FARTHEST_FIT`` of the candidate's own,
    whose sign it then has.
    """
    spanning, weighted, best = grids.spanning(groups, scale_dtype), weigh(groups), _Best.of(groups)
    best.scales, best.zeros = spanning.scales.float(), spanning.zeros
    for scale, zero in best.then([(best.scales, best.zeros), *tried], grids):
        plain = grids.rounded(scale, zero, scale_dtype)
        values = grids.through(groups, plain)
        pulled = weigh(values)
        loss = _loss(groups, weighted, values, pulled)
        ratio = (weighted * values).sum(-1) / pulled.mul_(values).sum(-1)
        fit = torch.where((ratio - 1).abs() < FARTHEST_FIT, ratio, 1.0) * plain.scales.float()
        fitted = grids.rounded(fit, zero, scale_dtype)
        values = grids.through(groups, fitted)
        for grid, error in ((plain, loss), (fitted, _loss(groups, weighted, values, weigh(values)))):
            best.take(error < best.worth, error, grid.scales.float(), grid.zeros)
    return best.scales, best.zeros


def _loss(groups: torch.Tensor, weighted: torch.Tensor, values: torch.Tensor, pulled: torch.Tensor) -> torch.Tensor:
    """The weighted error of each group, ``[A, G]``: ``(w - q) H (w - q)``, of ``w``, ``w H``, ``q`` and ``q H``."""
    return (weighted - pulled).mul_(groups - values).sum(-1)


def _search_stored(
    grids: Grids, groups: torch.Tensor, weigh: Weighing, tried: Sequence[Candidate], step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of the scales and zeros that are ``tried``, where groups that share a scale are judged together."""
    best = _Best.of(groups)
    for scales, zeros in tried:
        losses = []
        for start in range(0, groups.shape[0], step):
            part, scale, zero = (each[start : start + step] for each in (groups, scales, zeros))
            along, norm = _moments(grids, part, weigh(part), weigh, scale, zero)
            losses.append(scale.square() * norm - 2 * scale * along)
        loss = grids.pooled(torch.cat(losses))
        best.take(torch.logical_not(loss >= best.worth), loss, scales, zeros)
    return best.scales, best.zeros


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
