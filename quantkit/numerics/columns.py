"""The column solver of GPTQ (Frantar et al. 2022, arXiv:2210.17323), left-looking.

Columns are quantized one by one, and what each loses is made up for by the columns that are still free.
The usual code pushes every column's error onto all later ones. Here a column pulls, when its turn comes,
the errors of all earlier ones: those of earlier blocks by one matrix product, those of its own block by
one matrix-vector product. The arithmetic is the same, but nothing is written that is not read next.
On a GPU a block may be one kernel, which pushes within the block, see :mod:`quantkit.numerics.fused`.

Everything lies transposed, ``[columns, rows]``, so that a column is contiguous. Layers that are alike, as those of
experts are, go through the loop together: what each column costs beside its arithmetic is then spent once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch

from quantkit.numerics import fused
from quantkit.schemes.grids import Rounder

BLOCK = 32


@dataclass(frozen=True, slots=True)
class Steps:
    """How the columns of a block are quantized.

    Attributes:
        scales: float32 ``[layers, columns, rows]``.
        rounder: finds the nearest levels.
        first: the first of these columns among those of the rounder.
        known: what the rounder must know of each of them in turn, and maybe of more.
    """

    scales: torch.Tensor
    rounder: Rounder
    first: int
    known: Iterator[Any]


def solve_columns(
    weight: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    rounder: Rounder,
) -> torch.Tensor:
    """Quantize the columns of layers that are alike in the order in which they lie, each layer by itself.

    Args:
        weight: float32 ``[layers, columns, rows]``; it is overwritten.
        factor: upper Cholesky factor of each layer's inverse Hessian, ``[layers, columns, columns]``.
        scales: float32 ``[layers, columns, rows]``, the scale of each weight.
        rounder: finds the nearest levels of columns ``[layers, rows]``.

    Returns:
        Levels, float32 ``[layers, columns, rows]``.
    """
    block = fused.BLOCK if fused.is_fused(weight.device, rounder) else BLOCK
    return sweep(weight, factor, known_steps(scales, rounder), even_bounds(weight.shape[1], block))[0]


def known_steps(scales: torch.Tensor, rounder: Rounder) -> Callable[[int, int, torch.Tensor], Steps]:
    """Scales that are known from the start, see :func:`sweep`."""
    columns = rounder.columns()
    return lambda start, stop, errors: Steps(scales[:, start:stop], rounder, start, islice(columns, stop - start))


def even_bounds(columns: int, block: int = BLOCK) -> list[int]:
    """Where blocks of one width begin, see :func:`sweep`."""
    return [*range(0, columns, block), columns]


def sweep(
    weight: torch.Tensor,
    factor: torch.Tensor,
    steps: Callable[[int, int, torch.Tensor], Steps],
    bounds: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the columns of layers that are alike, whose scales are asked for block by block.

    Args:
        weight: as for :func:`solve_columns`.
        factor: likewise.
        steps: asked for each block when its turn comes, with its first column, the one after its last, and the errors
            of the columns before it, ``[layers, columns, rows]``, which ``weight`` has been given in this block alone.
        bounds: the first column of each block, and the number of columns.

    Returns:
        Levels, and by how much each column was missed when its turn came; float32 ``[layers, columns, rows]``.
    """
    levels = torch.empty_like(weight)
    errors = torch.empty_like(weight)
    pivots = factor.diagonal(dim1=1, dim2=2).unsqueeze(2)
    columns = _columns_of(weight, levels, errors)
    for start, stop in pairwise(bounds):
        push = factor[:, :stop, start:stop] / pivots[:, :stop]
        if start:
            weight[:, start:stop].baddbmm_(push[:, :start].mT, errors[:, :start], alpha=-1)
        block = steps(start, stop, errors[:, :start])
        current, nearest, missed = (each[:, start:stop] for each in (weight, levels, errors))
        of_block = fused.levels_of(block.rounder, block.first, stop - start, weight.device)
        if of_block is None:
            _one_by_one(block, columns, push[:, start:].mT.contiguous(), missed)
        else:
            fused.run(current, block.scales, of_block, push[:, start:], nearest, missed)
    return levels, errors


def _columns_of(*values: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The columns of ``[layers, columns, rows]``; views are made once: slicing in the loop would cost more than it."""
    yield from zip(*(each.unbind(1) for each in values), strict=True)


def _one_by_one(
    block: Steps, columns: Iterator[tuple[torch.Tensor, ...]], pull: torch.Tensor, earlier: torch.Tensor
) -> None:
    """Quantize the columns of a block, operation by operation.

    Args:
        block: its scales and levels.
        columns: the next are the block's: of the weight, of the levels and of the errors.
        pull: ``[layers, columns, columns]``, how much of what the column's column was missed by a row's column takes.
        earlier: the errors of the block.
    """
    within = torch.split(pull, 1, 1)
    for done, (weights, scale) in enumerate(zip(within, block.scales.unbind(1), strict=True)):
        current, nearest, error = next(columns)
        if done:
            current.unsqueeze(1).baddbmm_(weights[..., :done], earlier[:, :done], alpha=-1)
        block.rounder.nearest_(torch.div(current, scale, out=nearest), next(block.known))
        torch.addcmul(current, nearest, scale, value=-1, out=error)
