"""How a walk gets by with the memory there is: what its activations take, and where they wait.

No byte of what is solved depends on it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from quantkit.engine.parking import Parking
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.twins import paired_tokens
from quantkit.engine.walk import Strategy
from quantkit.system.free_memory import free_bytes
from quantkit.system.memory_bounds import NO_BOUNDS, MemoryBounds
from quantkit.system.units import in_units

SPARE_MEMORY = 0.5
"""Share of the free memory that activations may take."""
EXPERTS_MEMORY = 0.2
"""Share of it that the statistics of a layer's experts may take."""


def paused_bytes(widest: int, hidden: int, tokens: int, size: int, paired: int = 0) -> int:
    """Bytes of activations alive at the widest pause: what the widest layer reads, and the stream beside it.

    Args:
        widest: numbers that a layer reads of a token, at most.
        hidden: width of the residual stream.
        tokens: of all batches.
        size: bytes of a number in the passes.
        paired: tokens of those that have a twin, see :mod:`quantkit.engine.twins`.
    """
    # At down_proj a block holds the gate, its activation and the product, and the residual stream twice.
    # A twin has left what the groups of the block are given, and stands before the next.
    return (tokens * (3 * widest + 2 * hidden) + paired * (widest + 5 * hidden)) * size


def waiting_bytes(hidden: int, tokens: int, size: int, paired: int = 0) -> int:
    """Bytes of activations that wait between two blocks: the hidden states of all tokens, and their embeddings.

    See :func:`paused_bytes` for the arguments.
    """
    return (tokens + paired) * 2 * hidden * size


def choose_strategy(
    skeleton: Skeleton,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    corrected: bool = False,
    tuned: bool = False,
    bounds: MemoryBounds = NO_BOUNDS,
) -> Strategy:
    """One pass where the paused activations fit into half of the free memory, else, or to tune, a run per group."""
    if tuned:
        return "recompute"
    widest = max((layer.shape[1] for layer in skeleton.layers()), default=0)
    paired = _paired(tokens, device, corrected)
    paused = paused_bytes(widest, _hidden(skeleton), tokens, dtype.itemsize, paired)
    return "one-pass" if paused <= SPARE_MEMORY * free_bytes(device, bounds) else "recompute"


def choose_parking(
    skeleton: Skeleton,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    corrected: bool = False,
    tuned: bool = False,
    bounds: MemoryBounds = NO_BOUNDS,
    folder: Path | None = None,
    *,
    always: bool = False,
) -> tuple[Parking | None, str]:
    """Where activations wait between blocks, and what is to be said of it; where they are, while that fits.

    Args:
        skeleton: the model.
        tokens: of all batches.
        dtype: of the passes.
        device: of the walk.
        corrected: passes have twins.
        tuned: blocks are tuned, for which all activations of a block are in memory.
        bounds: what may be taken.
        folder: where they wait on disk if the bounds name none; None for nowhere.
        always: not on a GPU, whatever is free.
    """
    waiting = waiting_bytes(_hidden(skeleton), tokens, dtype.itemsize, _paired(tokens, device, corrected))
    if not always and (tuned or waiting <= SPARE_MEMORY * free_bytes(device, bounds)):
        return None, ""
    if tuned:
        return Parking(), ""
    room, disk = int(SPARE_MEMORY * free_bytes(torch.device("cpu"), bounds)), bounds.disk or folder
    if waiting <= room or disk is None:
        return Parking(room), f"{in_units(waiting)} of activations wait in the memory of the CPU between blocks"
    return Parking(room, disk), (
        f"activations take {in_units(waiting)} between blocks, of which {in_units(room)} wait in memory and the rest "
        f"in {disk}, which changes no byte"
    )


def _paired(tokens: int, device: torch.device, corrected: bool) -> int:
    return paired_tokens(tokens, device.type) if corrected else 0


def _hidden(skeleton: Skeleton) -> int:
    hidden: int = skeleton.text.get_input_embeddings().weight.shape[1]
    return hidden


def experts_room(device: torch.device, bounds: MemoryBounds = NO_BOUNDS) -> int:
    """Bytes that the statistics of a layer's experts may take at a time."""
    return int(EXPERTS_MEMORY * free_bytes(device, bounds))
