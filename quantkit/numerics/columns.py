"""The column solver of GPTQ (Frantar et al. 2022, arXiv:2210.17323), left-looking.

Columns are quantized one by one, and what each loses is made up for by the columns that are still free.
The usual code pushes every column's error onto all later ones. Here a column pulls, when its turn comes,
the errors of all earlier ones: those of earlier blocks by one matrix product, those of its own block by
one matrix-vector product. The arithmetic is the same, but nothing is written that is not read next.

Everything lies transposed, ``[columns, rows]``, so that a column is contiguous.
"""

from __future__ import annotations

import torch

BLOCK = 32


def solve_columns(
    weight: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    limits: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Quantize the columns in the order in which they lie.

    Args:
        weight: float32 ``[columns, rows]``; it is overwritten.
        factor: upper Cholesky factor of the inverse Hessian, ``[columns, columns]``.
        scales: float32 ``[columns, rows]``, the scale of each weight.
        limits: lowest and highest step (``code - zero``), float32 ``[columns, rows]``.

    Returns:
        Steps as float32 whole numbers ``[columns, rows]``.
    """
    columns, _ = weight.shape
    steps = torch.empty_like(weight)
    errors = torch.empty_like(weight)
    inverse_scales = 1 / scales
    push = factor / factor.diagonal().unsqueeze(1)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        if start:
            weight[start:stop].addmm_(push[:start, start:stop].T, errors[:start], alpha=-1)
        for column in range(start, stop):
            current, nearest = weight[column], steps[column]
            if column > start:
                current.addmv_(errors[start:column].T, push[start:column, column], alpha=-1)
            torch.mul(current, inverse_scales[column], out=nearest).round_()
            torch.clamp(nearest, limits[0][column], limits[1][column], out=nearest)
            torch.addcmul(current, nearest, scales[column], value=-1, out=errors[column])
    return steps
