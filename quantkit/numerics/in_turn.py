"""Scales chosen in turn: those of a group when the column solver comes to the first of its columns.

By then the group's weights have moved, to make up for what earlier columns lost, and may need another scale than they
did. For each scale to try, the group is solved by itself, columns outside of it left free, and the scale is taken that
loses least: ``Σ (e_i / U_ii)²`` over what each column was missed by, with ``U`` restricted to the group, is exactly by
how much the layer's error grows if the others make up for it. A search beforehand judges rounding to nearest of weights
that are not yet moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit.numerics import fused
from quantkit.numerics.columns import BLOCK, Steps, even_bounds, known_steps, sweep
from quantkit.numerics.factor import strongest_first
from quantkit.schemes.grids import Grid, Grids
from quantkit.system.host import whole_numbers

CHUNK = 1 << 18
"""Weights that are solved at a time, with one candidate each: few enough for the caches."""
LEAST_ROWS = 16
WITHIN = 16
"""Columns of a block where a group is solved by itself."""
WIDEST = 128
"""Columns of a group up to which its scale is chosen in turn; a wider one would take longer than the layer."""


@dataclass(frozen=True, slots=True)
class Search:
    """What scales are tried.

    Attributes:
        scale_dtype: dtype in which scales are stored.
        candidates: ranges tried per group.
        negative_scales: see :func:`quantkit.numerics.grid_search.search_grid`.
    """

    scale_dtype: torch.dtype
    candidates: int
    negative_scales: bool


class OpenLayer:
    """A layer whose scales are chosen as it is solved.

    Attributes:
        weight: float32 ``[columns, rows]`` in the order of solving, which the solver overwrites block by block.
        factor: float32 ``[columns, columns]``, in this order.
        grids: of this layer.
        scales, zeros: of the groups, float32 ``[rows, groups]``; those that are still open are not yet set.
    """

    def __init__(
        self, weight: torch.Tensor, factor: torch.Tensor, order: torch.Tensor | None, grids: Grids, search: Search
    ) -> None:
        columns, rows = weight.shape
        groups = grids.scheme.groups(columns)
        self.weight, self.factor, self.grids, self.search = weight, factor, grids, search
        self.scales = torch.empty(rows, groups, device=weight.device)
        self.zeros = torch.empty_like(self.scales)
        order = torch.arange(columns, device=weight.device) if order is None else order
        self._group_of = order // (columns // groups)
        self._places = order.argsort().view(groups, -1).sort(1).values
        self.opens = {place: group for group, place in enumerate(whole_numbers(self._places[:, 0]))}

    def choose(self, start: int, stop: int, errors: torch.Tensor) -> None:
        """Choose the scale of the group whose first column is the first of a block, if there is one.

        Args:
            start: first column of the block.
            stop: the column after its last.
            errors: of the columns before it, ``[columns, rows]``.
        """
        group = self.opens.get(start)
        if group is None:
            return
        places = self._places[group]
        moved = self._moved(places, stop, errors)
        factor = self.factor[places.unsqueeze(1), places]
        step = max(LEAST_ROWS, CHUNK // (len(places) * self.search.candidates))
        step = step if moved.device.type == "cpu" else moved.shape[1]
        found = [_best(part, factor, self.grids, self.search) for part in torch.split(moved, step, 1)]
        self.scales[:, group], self.zeros[:, group] = (torch.cat(each) for each in zip(*found, strict=True))

    def steps(self, start: int, stop: int) -> Grid:
        """Scales and zeros of each weight of a block, ``[rows, stop - start]``."""
        groups = self._group_of[start:stop]
        return Grid(self.scales[:, groups], self.zeros[:, groups])

    def grid(self) -> Grid:
        """What was chosen, as it is stored.

        Raises:
            QuantizationError: a weight or a scale is not finite, or beyond what its dtype holds.
        """
        return self.grids.stored(self.scales, self.zeros, self.search.scale_dtype)

    def _moved(self, places: torch.Tensor, stop: int, errors: torch.Tensor) -> torch.Tensor:
        """Weights at some places as they would be if their turn came now, ``[places, rows]``."""
        start, moved = len(errors), self.weight[places]
        if not start:
            return moved
        push = self.factor[:start, places] / self.factor.diagonal()[:start].unsqueeze(1)
        # The solver has moved the columns of its block already.
        push.masked_fill_((places < stop).unsqueeze(0), 0)
        return moved.addmm_(push.T, errors, alpha=-1)


def solve_in_turn(layers: Sequence[OpenLayer]) -> list[torch.Tensor]:
    """The levels of layers that are alike, float32 ``[columns, rows]`` each; their scales are chosen on the way."""
    together = len(layers) > 1
    weight = torch.stack([each.weight for each in layers]) if together else layers[0].weight.unsqueeze(0)
    factor = torch.stack([each.factor for each in layers]) if together else layers[0].factor.unsqueeze(0)
    for each, own in zip(layers, weight.unbind(0), strict=True):
        each.weight = own

    def steps(start: int, stop: int, errors: torch.Tensor) -> Steps:
        for each, missed in zip(layers, errors.unbind(0), strict=True):
            each.choose(start, stop, missed)
        blocks = [each.steps(start, stop) for each in layers]
        rows = weight.shape[2]
        first, *others = (
            each.grids.rounder(block, rows, stop - start) for each, block in zip(layers, blocks, strict=True)
        )
        rounder = first.beside(others)
        return Steps(torch.stack([block.scales.T for block in blocks]), rounder, 0, rounder.columns())

    block = fused.BLOCK if not fused.refusal(weight.device, layers[0].grids) else BLOCK
    bounds = {*even_bounds(weight.shape[1], block), *(place for each in layers for place in each.opens)}
    return list(sweep(weight, factor, steps, sorted(bounds))[0].unbind(0))


def _best(
    weight: torch.Tensor, factor: torch.Tensor, grids: Grids, search: Search
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale and zero of a group, ``[rows]``.

    Args:
        weight: float32 ``[columns_per_group, rows]`` in the order of solving.
        factor: float32 ``[columns_per_group, columns_per_group]``.
        grids: of the layer.
        search: what to try.
    """
    size, rows = weight.shape
    groups = weight.T.unsqueeze(1).contiguous()
    tried = grids.candidates(groups, search.candidates, negative_scales=search.negative_scales)
    stored = [grids.rounded(scale, zero, search.scale_dtype) for scale, zero in tried]
    grid = Grid(torch.cat([each.scales.float() for each in stored]), torch.cat([each.zeros for each in stored]))
    copies = weight.repeat(1, len(stored)).unsqueeze(0)
    rounder = grids.rounder(grid, len(stored) * rows, size).beside([])
    steps = known_steps(grid.scales.T.expand(1, size, -1), rounder)
    within = fused.BLOCK if fused.is_fused(weight.device, rounder) else WITHIN
    errors = sweep(copies, factor.unsqueeze(0), steps, even_bounds(size, within))[1].squeeze(0)
    losses = errors.div_(factor.diagonal().unsqueeze(1)).square_().sum(0)
    best = losses.view(len(stored), rows).argmin(0, keepdim=True)
    scales, zeros = (each.view(len(stored), rows).gather(0, best).squeeze(0) for each in (grid.scales, grid.zeros))
    return scales, zeros


def order_of_groups(weight: torch.Tensor, strength: torch.Tensor, grids: Grids) -> torch.Tensor:
    """The columns in the order of solving for grids that are solved as wholes, int64 ``[columns]``.

    How much a group loses goes with the squares of its inputs and of its scale. An order by inputs alone can be worse
    than none where groups are unlike: it takes from a column the free ones that lose little.

    Args:
        weight: float32 ``[rows, columns]``.
        strength: float32 ``[columns]``, the mean square of each input.
        grids: of the scheme.
    """
    groups = grids.grouped(weight)
    squares = groups.abs().amax(-1).square_().mean(0)
    return strongest_first(strength * squares.repeat_interleave(groups.shape[2]), groups.shape[2])


def is_in_turn(grids: Grids, columns: int) -> bool:
    """Whether the scales of a weight of so many columns can be chosen in turn, at a cost that is worth it."""
    return grids.independent and grids.scheme.columns_per_group(columns) <= WIDEST
