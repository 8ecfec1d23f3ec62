"""The column solver of GPTQ (Frantar et al. 2022, arXiv:2210.17323), left-looking.

Columns are quantized one by one, and what each loses is made up for by the columns that are still free.
The usual code pushes every column's error onto all later ones. Here a column pulls, when its turn comes,
the errors of all earlier ones: those of earlier blocks by one matrix product, those of its own block by
one matrix-vector product. The arithmetic is the same, but nothing is written that is not read next.

Everything lies transposed, ``[columns, rows]``, so that a column is contiguous. Layers that are alike, as those of
experts are, go through the loop together: what each column costs beside its arithmetic is then spent once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, TypeAlias

import torch

from quantkit.schemes.grids import Rounder
from quantkit.system.products import subtract_products_

BLOCK = 32

Steps: TypeAlias = tuple[torch.Tensor, Rounder, Iterator[Any]]
"""Of a block of columns the scales, float32 ``[layers, columns, rows]``, and what finds their nearest levels."""


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
    return sweep(weight, factor, known_steps(scales, rounder), even_bounds(weight.shape[1]))[0]


def known_steps(scales: torch.Tensor, rounder: Rounder) -> Callable[[int, int, torch.Tensor], Steps]:
    """Scales that are known from the start, see :func:`sweep`."""
    columns = rounder.columns()
    return lambda start, stop, errors: (scales[:, start:stop], rounder, islice(columns, stop - start))


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
    # Views are made once: slicing inside the loop would cost more than the arithmetic.
    columns_of = zip(*(each.unbind(1) for each in (weight, levels, errors)), strict=True)
    for start, stop in pairwise(bounds):
        push = factor[:, :stop, start:stop] / pivots[:, :stop]
        if start:
            subtract_products_(weight[:, start:stop], push[:, :start].mT, errors[:, :start])
        scales, rounder, known = steps(start, stop, errors[:, :start])
        within = torch.split(push[:, start:].mT.contiguous(), 1, 1)
        earlier = errors[:, start:stop]
        for done, (weights, scale) in enumerate(zip(within, scales.unbind(1), strict=True)):
            current, nearest, error = next(columns_of)
            if done:
                current.unsqueeze(1).baddbmm_(weights[..., :done], earlier[:, :done], alpha=-1)
            rounder.nearest_(torch.div(current, scale, out=nearest), next(known))
            torch.addcmul(current, nearest, scale, value=-1, out=error)
    return levels, errors
