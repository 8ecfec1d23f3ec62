"""Refinement of a solved weight: better scales for its codes, then better codes for its scales.

Both lower the same quantity, the layer error ``Σ (w - ŵ) H (w - ŵ)ᵀ`` with the damped Gram matrix ``H`` of
the inputs. With the codes held, the error is quadratic in the scales of a row, which a small linear system
solves exactly. With the scales held, each code in turn goes to its best value given all others
(coordinate descent), which can only lower the error.

As in :mod:`quantkit.numerics.columns` everything lies transposed, ``[columns, rows]``, but in the order of
the checkpoint, so that groups are contiguous. Levels are what codes stand for in units of their scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantkit.numerics import fused
from quantkit.schemes.grids import Grid, Grids, Rounder
from quantkit.system.products import product

BLOCK = 32
SYSTEM = 1 << 26
"""Numbers in the systems of equations that are solved at a time: 256 MiB."""
EVEN = 128
"""Rows come in multiples of this many, of which products of matrices give each the same result in any number."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A layer to refine.

    Attributes:
        weight: float32 ``[columns, rows]``, the float weight.
        gram: float32 ``[columns, columns]``, by which errors are told.
        hessian: the same, shrunk and damped, which is what the refinement lowers.
        response: ``hessian @ weight``, ``[columns, rows]``.
        grids: what the codes can stand for.
        shrinkage: see :func:`quantkit.numerics.factor.damped`.
    """

    weight: torch.Tensor
    gram: torch.Tensor
    hessian: torch.Tensor
    response: torch.Tensor
    grids: Grids
    shrinkage: float = 0.0

    def energy(self) -> torch.Tensor:
        """The error of leaving the layer out, ``[rows]``."""
        kept = 1 - self.shrinkage
        ridge = torch.sub(self.hessian.diagonal(), self.gram.diagonal(), alpha=kept).unsqueeze(1)
        found = torch.addcmul(self.response, ridge, self.weight, value=-1).mul_(self.weight).sum(0)
        return found.div_(kept).clamp_(min=0)

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """The scale of each weight, float32 ``[columns, rows]``."""
        columns, rows = self.weight.shape
        return self.grids.spread(scales.float(), rows, columns)

    def rounder(self, grid: Grid) -> Rounder:
        """Finds the nearest levels of this layer on a grid."""
        columns, rows = self.weight.shape
        return self.grids.rounder(grid, rows, columns)

    def attempt(self, levels: torch.Tensor, grid: Grid) -> Attempt:
        """Levels ``[columns, rows]`` and their grid with the error of each row."""
        missing = torch.addcmul(self.weight, levels, self.spread(grid.scales), value=-1)
        return Attempt(levels, grid, row_errors(missing, self.gram))


@dataclass(frozen=True, slots=True)
class Attempt:
    """Levels ``[columns, rows]``, their grid as stored, and the error of each row."""

    levels: torch.Tensor
    grid: Grid
    error: torch.Tensor

    def or_better(self, other: Attempt) -> Attempt:
        """Of each row the attempt with less error."""
        better = other.error < self.error

        def chosen(found: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
            """Of what belongs to rows; what all rows share is the same in both."""
            of_rows = kept.ndim == 2 and len(kept) == len(better)
            return torch.where(better.unsqueeze(1), found, kept) if of_rows else kept

        one, two = self.grid, other.grid
        parts = {name: chosen(two.parts[name], part) for name, part in one.parts.items()}
        grid = Grid(chosen(two.scales, one.scales), chosen(two.zeros, one.zeros), parts)
        return Attempt(
            torch.where(better, other.levels, self.levels), grid, torch.where(better, other.error, self.error)
        )


def refine(problem: Problem, solved: Attempt, rounds: int) -> Attempt:
    """Refit scales and descend over codes, ``rounds`` times; a row that this does not improve is left alone.

    Where scales are not free, and the scheme has no refit of its own, only the codes are refined.
    """
    if rounds == 0:
        return solved
    levels, grid = solved.levels.clone(), solved.grid
    for _ in range(rounds):
        levels, grid = _refitted(problem, levels, grid)
        descend(problem.weight, levels, problem.spread(grid.scales), problem.rounder(grid), problem.hessian)
    return solved.or_better(problem.attempt(levels, grid))


def _refitted(problem: Problem, levels: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, Grid]:
    """Levels of the same codes on the grid that suits them best."""
    grids = problem.grids
    own = grids.refitted(problem.weight, levels, grid, problem.hessian)
    if own is not None or not grids.scheme.free_scales:
        return own or (levels, grid)
    scales = refit_scales(problem.response, levels, problem.hessian, grid.scales.shape[1]).T
    # A group of zeros leaves its scale undetermined, and no scale may turn its sign: then the old one stays.
    rounded = grids.rounded(scales, grid.zeros, grid.scales.dtype).scales
    return levels, replace(grid, scales=torch.where(scales * grid.scales > 0, rounded, grid.scales))


def refit_scales(response: torch.Tensor, levels: torch.Tensor, hessian: torch.Tensor, groups: int) -> torch.Tensor:
    """The scales of least layer error for given codes.

    Args:
        response: float32 ``[columns, rows]``, ``hessian @ weight``.
        levels: float32 ``[columns, rows]``.
        hessian: float32 ``[columns, columns]``, positive definite.
        groups: number of groups; each holds ``columns / groups`` neighbouring columns.

    Returns:
        float32 ``[groups, rows]``; 0 for a group whose levels are all zero.
    """
    rows = max(1, SYSTEM // groups**2 // EVEN) * EVEN
    parts = zip(torch.split(response, rows, 1), torch.split(levels, rows, 1), strict=True)
    return torch.cat([_refit_rows(*part, hessian, groups) for part in parts], 1)


def _refit_rows(response: torch.Tensor, levels: torch.Tensor, hessian: torch.Tensor, groups: int) -> torch.Tensor:
    """:func:`refit_scales` of as many rows as one system of equations takes."""
    columns, rows = response.shape
    size = columns // groups
    target = (response * levels).view(groups, size, rows).sum(1)
    system = torch.empty(rows, groups, groups, device=response.device)
    for group in range(groups):
        start, stop = group * size, (group + 1) * size
        pulled = hessian[start:, start:stop] @ levels[start:stop]
        part = pulled.mul_(levels[start:]).view(groups - group, size, rows).sum(1).T
        system[:, group:, group] = part
        system[:, group, group:] = part
    # A group whose levels are all zero would make the system singular.
    ridge = system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).mul_(1e-6)
    system.diagonal(dim1=1, dim2=2).add_(ridge.clamp_(min=torch.finfo(torch.float32).tiny))
    # The device is asked nothing; a scale that is not finite, as a singular system gives, leaves the old one in place.
    solved: torch.Tensor = torch.linalg.solve_ex(system, target.T).result
    return solved.T.nan_to_num(0.0, 0.0, 0.0)


def descend(
    weight: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    rounder: Rounder,
    hessian: torch.Tensor,
) -> None:
    """One sweep of coordinate descent over the codes; ``levels`` is changed in place.

    Args:
        weight: float32 ``[columns, rows]``, the float weight.
        levels: float32 ``[columns, rows]``.
        scales: float32 ``[columns, rows]``, the scale of each weight.
        rounder: finds the nearest levels.
        hessian: float32 ``[columns, columns]``, positive definite.
    """
    missing = torch.addcmul(weight, levels, scales, value=-1)
    pivots = hessian.diagonal().unsqueeze(1)
    block = fused.BLOCK if fused.is_fused(weight.device, rounder) else BLOCK
    moves = torch.empty(block, weight.shape[1], device=weight.device)
    earlier = [moves[:done].T for done in range(BLOCK)]
    columns = _columns_of(levels, scales, rounder)
    for start in range(0, len(weight), block):
        stop = min(start + block, len(weight))
        pull = hessian[start:stop] / pivots[start:stop]
        wanted, within, moved = product(pull, missing), pull[:, start:stop], moves[: stop - start]
        of_block = fused.levels_of(rounder, start, stop - start, weight.device)
        if of_block is None:
            _descend_one_by_one(wanted, columns, rounder, within, earlier, moved)
        else:
            _descend_at_once(wanted, levels[start:stop], scales[start:stop], of_block, within, moved)
        missing[start:stop].sub_(moved)


def _columns_of(
    levels: torch.Tensor, scales: torch.Tensor, rounder: Rounder
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Any]]:
    """The columns of levels and scales, and what the rounder must know of each."""
    yield from zip(levels.unbind(0), scales.unbind(0), rounder.columns(), strict=False)


def _descend_one_by_one(
    wanted: torch.Tensor,
    columns: Iterator[tuple[torch.Tensor, torch.Tensor, Any]],
    rounder: Rounder,
    within: torch.Tensor,
    earlier: Sequence[torch.Tensor],
    moves: torch.Tensor,
) -> None:
    """Descend over the codes of a block, operation by operation.

    Args:
        wanted: by how much each weight wants to move for the errors of all others, float32 ``[columns, rows]``.
        columns: the next are the block's.
        rounder: finds the nearest levels.
        within: ``[columns, columns]``, how much of a column's move a row's column is spared.
        earlier: the first of the moves, by their number.
        moves: is filled, ``[columns, rows]``.
    """
    nearest = torch.empty_like(moves[0])
    for done, (current, weights) in enumerate(zip(wanted.unbind(0), within.unbind(0), strict=True)):
        level, scale, column = next(columns)
        if done:
            current.addmv_(earlier[done], weights[:done], alpha=-1)
        rounder.nearest_(torch.addcdiv(level, current, scale, out=nearest), column)
        torch.sub(nearest, level, out=moves[done]).mul_(scale)
        level.copy_(nearest)


def _descend_at_once(
    wanted: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    of_block: fused.Levels,
    within: torch.Tensor,
    moves: torch.Tensor,
) -> None:
    """The same by one kernel; ``levels`` and ``scales`` are the block's."""
    nearest = torch.empty_like(moves)
    start, spread, push = (each.unsqueeze(0) for each in (wanted, scales, within.T.contiguous()))
    found, moved, before = (each.unsqueeze(0) for each in (nearest, moves, levels))
    fused.run(start, spread, of_block, push, found, moved, before)
    levels.copy_(nearest)


def row_errors(difference: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
    """Mean square error of the outputs, float32 ``[rows]``.

    Args:
        difference: float32 ``[columns, rows]``, the float weight less the quantized one.
        gram: ``XᵀX / tokens``; None takes inputs as uncorrelated and of unit variance.
    """
    if gram is None:
        return difference.square().sum(0)
    return product(gram, difference).mul_(difference).sum(0).clamp_(min=0)
