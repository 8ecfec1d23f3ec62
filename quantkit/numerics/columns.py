"""The column solver of GPTQ (Frantar et al. 2022, arXiv:2210.17323), left-looking.

Columns are quantized one by one, and what each loses is made up for by the columns that are still free.
The usual code pushes every column's error onto all later ones. Here a column pulls, when its turn comes,
the errors of all earlier ones: those of earlier blocks by one matrix product, those of its own block by
one matrix-vector product. The arithmetic is the same, but nothing is written that is not read next.

Everything lies transposed, ``[columns, rows]``, so that a column is contiguous. Layers that are alike, as those of
experts are, go through the loop together: what each column costs beside its arithmetic is then spent once for all.
"""

from __future__ import annotations

import torch

from quantkit.schemes.grids import Rounder

BLOCK = 32


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
    columns = weight.shape[1]
    levels = torch.empty_like(weight)
    errors = torch.empty_like(weight)
    pivots = factor.diagonal(dim1=1, dim2=2).unsqueeze(2)
    # Views are made once: slicing inside the loop would cost more than the arithmetic.
    columns_of = zip(*(each.unbind(1) for each in (weight, levels, errors, scales)), rounder.columns(), strict=False)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        push = factor[:, :stop, start:stop] / pivots[:, :stop]
        if start:
            weight[:, start:stop].baddbmm_(push[:, :start].mT, errors[:, :start], alpha=-1)
        within = torch.split(push[:, start:].mT.contiguous(), 1, 1)
        earlier = errors[:, start:stop]
        for done, weights in enumerate(within):
            current, nearest, error, scale, column = next(columns_of)
            if done:
                current.unsqueeze(1).baddbmm_(weights[..., :done], earlier[:, :done], alpha=-1)
            rounder.nearest_(torch.div(current, scale, out=nearest), column)
            torch.addcmul(current, nearest, scale, value=-1, out=error)
    return levels
