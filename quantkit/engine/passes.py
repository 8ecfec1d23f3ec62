"""Forward passes that can stand still: one coroutine a batch.

Every batch's forward through the whole model is a greenlet. It pauses before each segment and wherever a
hook asks it to, and goes on when the walk resumes it, so the model's own code decides what each block is
given (masks, rotary embeddings, sliding windows) and no block is run twice. While it stands before a segment, what it
holds may wait in the memory of the CPU: the tensors stay the same objects, and the model's code finds them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from quantkit.engine.batches import Batch


@dataclass(frozen=True, slots=True)
class AtSegment:
    """A pass stands before a segment and would call it with these arguments."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class AtGroup:
    """A pass stands inside a segment, before the first layer of a group."""

    group: int


@dataclass(frozen=True, slots=True)
class AtEnd:
    """A pass stands behind the last segment."""


Place = AtSegment | AtGroup | AtEnd


class Pass(greenlet):  # type: ignore[misc]  # greenlet has no type hints
    """One batch on its way through the model.

    Attributes:
        batch: its tokens.
        place: where it stands; None before it has started.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self._model = model
        self.batch = batch
        self.place: Place | None = None

    def run(self) -> None:
        """The body of the coroutine: the model's forward, without a cache."""
        self._model(input_ids=self.batch.token_ids, use_cache=False)

    def resume(self) -> None:
        """Go on until the next pause."""
        self.place = self.switch()
        if isinstance(self.place, AtEnd):
            self.stop()

    def stop(self) -> None:
        """End the pass where it stands and let go of its activations."""
        if self.place is not None and not self.dead:
            self.throw()
        self.place = AtEnd()


def pause(place: Place) -> None:
    """Called from a hook: if a pass runs it, stand still here until resumed."""
    current = getcurrent()
    if isinstance(current, Pass):
        current.parent.switch(place)


def running_batch() -> Batch:
    """The batch of the pass that runs the hook that calls this."""
    current = getcurrent()
    if not isinstance(current, Pass):
        raise RuntimeError("no pass is running")
    return current.batch


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
