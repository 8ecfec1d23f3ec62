"""Whether a model's tokens see what is to their right; found by trying, not from a table of model names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from quantkit.engine.groups import Enough
from quantkit.engine.passes import told
from quantkit.engine.segment import WeightReader
from quantkit.engine.skeleton import Skeleton

LENGTH = 8
"""Tokens of the rows that are tried."""
ROW = tuple(range(1, LENGTH + 1))
TOLERANCE = 1e-3
"""Change on the left, relative to that of the token that was changed, that counts as none."""


def can_be_padded(skeleton: Skeleton, reader: WeightReader, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tokens at the end of a row leave all before them as they are, in the first block of a model.

    They do not where attention looks both ways, nor can padding be left out where a model puts tokens of its own before
    those that it is given.

    Args:
        skeleton: the model; its first block is loaded for the time.
        reader: where weights come from.
        device: where it is tried.
        dtype: in which.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape, or not finite.
    """
    first, second = after_first_block(skeleton, reader, device, dtype)
    if first.ndim != 3 or first.shape[:2] != (1, LENGTH) or first.shape != second.shape:
        return False
    change = (first.float() - second.float()).abs().amax(-1)[0]
    return bool((change[:-1] <= TOLERANCE * change[-1]).all())


def after_first_block(
    skeleton: Skeleton,
    reader: WeightReader,
    device: torch.device,
    dtype: torch.dtype,
    rows: Sequence[Sequence[int]] = (ROW, (*ROW[:-1], 0)),
) -> list[torch.Tensor]:
    """What the first block makes of rows, by default of two that differ in their last token.

    Args:
        skeleton: the model; its first block is loaded for the time.
        reader: where weights come from.
        device: where it is tried.
        dtype: in which.
        rows: token ids.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape, or not finite.
    """
    segment, found = skeleton.segments[0], list[torch.Tensor]()

    def look(_: nn.Module, __: Any, returned: Any) -> None:
        found.append(returned[0] if isinstance(returned, tuple | list) else returned)
        raise Enough

    skeleton.load_frame(reader, device, dtype)
    skeleton.load(segment, reader, device, dtype)
    hook = segment.module.register_forward_hook(look)
    try:
        with torch.no_grad():
            for row in rows:
                with told(skeleton.text), suppress(Enough):
                    skeleton.text(input_ids=torch.tensor([row], device=device), use_cache=False)
    finally:
        hook.remove()
        skeleton.unload(segment)
    return found
