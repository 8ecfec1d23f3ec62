"""Activations that wait in the memory of the CPU while their pass stands before a segment.

The coroutine of a pass holds the tensors with which it would call the segment. They stay the same objects; what moves
is what they hold, so that the model's own code finds them where it left them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from quantkit.engine.passes import AtSegment, Place

CPU = torch.device("cpu")


def move(place: Place | None, device: torch.device) -> None:
    """Move what a pass that stands before a segment holds; nothing where it stands elsewhere."""
    if not isinstance(place, AtSegment):
        return
    for tensor in _tensors([place.args, place.kwargs]):
        if tensor.device != device:
            tensor.data = tensor.data.to(device)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
