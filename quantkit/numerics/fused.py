"""Loops over columns as one kernel of a GPU, where that can be had; else operation by operation.

A column takes about a dozen operations that are shorter than what it takes to start them, and thousands of columns wait
for each other. Where triton is installed, :mod:`quantkit.numerics.columns_kernel` does all columns of a block at once.
It is tried on a small problem before it is relied on, beside the plain loop: whatever is missing, a compiler for one,
comes out then, and loops go operation by operation.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from quantkit.schemes import Mxfp4Scheme, Nf4Scheme
from quantkit.schemes.grids import Grids, Rounder
from quantkit.schemes.grids.base import Uniform
from quantkit.schemes.grids.blockfloat import E2m1Grids
from quantkit.schemes.grids.fixed import TableGrids
from quantkit.schemes.grids.floating import Fp8Grids
from quantkit.schemes.grids.ggml import KQuantGrids
from quantkit.schemes.grids.integer import IntGrids, Limits, Shifted

BLOCK = 128
"""Columns of a block at most: what a program holds of a row."""
ROWS = 32
"""Rows of a program."""
LEAST_WIDTH = 16
"""Blocks are padded to a power of two of at least so many columns."""
AGREE = 0.9
"""Share of the rows of a trial that must have the levels of the plain loop; sums are rounded in another order."""


@dataclass(frozen=True, slots=True)
class Levels:
    """The levels of a block of columns, as the kernel is told them; its constants say what the kinds are.

    Attributes:
        kind: ``LIMITS``, ``SHIFTED``, ``TABLE`` or ``FLOATS``.
        low, high: numbers, or float32 ``[columns, layers, rows]`` or ``[columns, rows]``, where a kind has them.
        table: float32, the thresholds between levels and then the levels.
        factor: times the power of two of a float, the number by which it is rounded.
    """

    kind: str
    low: torch.Tensor | float = 0.0
    high: torch.Tensor | float = 0.0
    table: torch.Tensor | None = None
    factor: float = 0.0


def refusal(device: torch.device, grids: Grids) -> str:
    """Why loops over the columns of weights go operation by operation; empty where they are one kernel."""
    match grids:
        case IntGrids():
            kind = "SHIFTED" if grids.scheme.zeros == "float" else "LIMITS"
        case KQuantGrids():
            kind = "SHIFTED" if grids.scheme.minima else "LIMITS"
        case TableGrids():
            kind = "TABLE"
        case E2m1Grids() | Fp8Grids():
            kind = "FLOATS"
        case _:
            return f"there is no kernel for the levels of {grids.scheme.describe()}"
    return _refusal(device, kind)


def is_fused(device: torch.device, rounder: Rounder) -> bool:
    """Whether a loop on a device, with levels that a rounder finds, is one kernel."""
    kind = _kind(rounder) if device.type == "cuda" else None
    return kind is not None and not _refusal(device, kind)


def levels_of(rounder: Rounder, first: int, count: int, device: torch.device) -> Levels | None:
    """The levels of some columns; None where the loop over these goes operation by operation.

    Args:
        rounder: of layers that are alike, see :meth:`quantkit.schemes.grids.Rounder.beside`, or of one.
        first, count: the columns, among those of the rounder.
        device: of the loop.
    """
    return _levels(rounder, slice(first, first + count), device) if is_fused(device, rounder) else None


def _kind(rounder: Rounder) -> str | None:
    """The kind of levels that a rounder finds; None where the kernel has none like them."""
    match rounder:
        case Limits():
            return "LIMITS"
        case Shifted():
            return "SHIFTED"
        case Uniform(grids=TableGrids()):
            return "TABLE"
        case Uniform(grids=E2m1Grids() | Fp8Grids()):
            return "FLOATS"
    return None


def _levels(rounder: Rounder, columns: slice, device: torch.device) -> Levels | None:
    """The levels of some columns of a rounder; None where the kernel has none like them."""
    match rounder:
        case Limits(low=torch.Tensor() as low, high=torch.Tensor() as high):
            return Levels("LIMITS", low[columns], high[columns])
        case Limits(low=int(low), high=int(high)):
            return Levels("LIMITS", float(low), float(high))
        case Shifted():
            return Levels("SHIFTED", rounder.zeros[columns], float(rounder.last))
        case Uniform(grids=TableGrids() as grids):
            return Levels("TABLE", table=grids.thresholds_and_levels(device))
        case Uniform(grids=(E2m1Grids() | Fp8Grids()) as grids):
            return Levels("FLOATS", grids.least_power, grids.highest, factor=grids.rounds_at_one)
    return None


@cache
def _refusal(device: torch.device, kind: str) -> str:
    """Why there is no kernel for a kind of levels on a device; empty where there is one."""
    if device.type != "cuda":
        return "a CPU gains nothing by a kernel"
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        with torch.no_grad():
            return "" if agrees(device, kind) else "the kernel gave other results than the plain loop when it was tried"
    except Exception as error:  # triton's compilers and drivers fail in ways of their own; the plain loop needs none
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return f"the kernel failed when it was tried: {type(error).__name__}: {first}"


def agrees(device: torch.device, kind: str) -> bool:
    """Whether the kernel finds the levels of the plain loop on a small problem, solving as well as descending."""
    draw = torch.Generator().manual_seed(0)
    layers, columns, rows = 2, BLOCK, 48
    start, scales = (torch.randn(layers, columns, rows, generator=draw).to(device) for _ in range(2))
    scales = scales.abs_().add_(0.5)
    zeros = torch.randint(0, 16, (columns, layers, rows), generator=draw).float().to(device)
    push = torch.randn(layers, columns, columns, generator=draw).mul_(0.1).to(device)
    rounders: dict[str, list[Rounder]] = {
        "LIMITS": [Limits(-8, 7), Limits(-zeros, 15 - zeros)],
        "SHIFTED": [Shifted(zeros + 0.25, 15)],
        "TABLE": [Uniform(Nf4Scheme(64).grids())],
        "FLOATS": [Uniform(Mxfp4Scheme().grids())],
    }
    for rounder in rounders[kind]:
        levels = _levels(rounder, slice(0, columns), device)
        for before in (None, start.round()):
            if levels is None:
                return False
            found, errors = torch.empty_like(start), torch.empty_like(start)
            run(start, scales, levels, push, found, errors, before)
            same = (found == _plain(start, scales, rounder, push, before)).all(1)
            if not bool(same.float().mean() >= AGREE):
                return False
    return True


def _plain(
    start: torch.Tensor, scales: torch.Tensor, rounder: Rounder, push: torch.Tensor, before: torch.Tensor | None
) -> torch.Tensor:
    """The levels that :func:`run` is to find, column by column."""
    left, found = start.clone(), torch.empty_like(start)
    for column, known in zip(range(start.shape[1]), rounder.columns(), strict=False):
        current, scale = left[:, column], scales[:, column]
        wanted = current / scale if before is None else before[:, column] + current / scale
        rounder.nearest_(wanted, known)
        found[:, column] = wanted
        error = current - wanted * scale if before is None else (wanted - before[:, column]) * scale
        left[:, column + 1 :] -= push[:, column, column + 1 :].unsqueeze(2) * error.unsqueeze(1)
    return found


def run(
    start: torch.Tensor,
    scales: torch.Tensor,
    levels: Levels,
    push: torch.Tensor,
    found: torch.Tensor,
    errors: torch.Tensor,
    before: torch.Tensor | None = None,
) -> None:
    """Find the levels of a block of columns.

    Each column is divided by its scales and goes to the nearest levels, or with ``before``, its levels until then, to
    those nearest to the sum of both. What it was missed by, or with ``before`` what it moved by, is taken from the
    columns after it, times ``push``.

    Args:
        start: float32 ``[layers, columns, rows]``, what earlier blocks left of the columns; it stays as it is.
        scales: float32 ``[layers, columns, rows]``.
        levels: of these columns.
        push: float32 ``[layers, columns, columns]``, of a row's column to a column's; what lies above the diagonal.
        found: the levels go here, float32 ``[layers, columns, rows]``.
        errors: what was missed, or moved, goes here.
        before: with the strides of ``found``, and another tensor.
    """
    import triton

    from quantkit.numerics import columns_kernel as kernel

    layers, width, rows = start.shape
    low, high = (each.contiguous() if isinstance(each, torch.Tensor) else None for each in (levels.low, levels.high))
    scales, push = (each if each.stride(2) == 1 else each.contiguous() for each in (scales, push))
    # triton launches on the device that is current, whatever its tensors lie on
    with torch.cuda.device(start.device) if start.device.type == "cuda" else nullcontext():
        kernel.columns_kernel[(triton.cdiv(rows, ROWS), layers)](
            start,
            start if before is None else before,
            scales,
            start if low is None else low,
            start if high is None else high,
            start if levels.table is None else levels.table,
            push,
            found,
            errors,
            rows,
            width,
            *start.stride()[:2],
            *scales.stride()[:2],
            *((0, 0) if low is None else (low.stride(1) if low.ndim == 3 else 0, low.stride(0))),
            *push.stride()[:2],
            *found.stride()[:2],
            *errors.stride()[:2],
            0.0 if isinstance(levels.low, torch.Tensor) else levels.low,
            0.0 if isinstance(levels.high, torch.Tensor) else levels.high,
            0 if levels.table is None else (len(levels.table) + 1) // 2,
            levels.factor,
            KIND=getattr(kernel, levels.kind).value,
            VARIES=low is not None,
            DESCENDS=before is not None,
            WIDTH=max(LEAST_WIDTH, triton.next_power_of_2(width)),
            ROWS=ROWS,
            enable_fp_fusion=True,  # what versions of triton take for it differs, and bytes with it
        )
