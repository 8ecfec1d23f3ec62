"""Forward passes that can stand still: one coroutine a batch.

Every batch's forward through the whole model is a greenlet. It pauses before each segment and wherever a
hook asks it to, and goes on when the walk resumes it, so the model's own code decides what each block is
given (masks, rotary embeddings, sliding windows) and no block is run twice. While it stands before a segment, what it
holds may wait elsewhere, see :mod:`quantkit.engine.parking`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from quantkit.engine.batches import Batch
from quantkit.errors import QuantizationError, QuantkitError


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


@dataclass(frozen=True, slots=True)
class AtHead:
    """A pass stands before the output head, and will go through it."""


Place = AtSegment | AtGroup | AtEnd | AtHead


class Pass(greenlet):  # type: ignore[misc]  # greenlet has no type hints
    """One batch on its way through the model.

    Attributes:
        batch: its tokens.
        place: where it stands; None before it has started.
        state: what modules of the segment at which it stands keep between calls, see :func:`states`.
        been: the indices of the segments before which it stood; it does not pause there again.
        is_back: whether it runs through one of these again.
        parked: tensors that it has left elsewhere, see :mod:`quantkit.engine.parking`.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self._model = model
        self.batch = batch
        self.place: Place | None = None
        self.state: dict[tuple[nn.Module, str], Any] = {}
        self.been: set[int] = set()
        self.is_back = False
        self.parked: list[ref[torch.Tensor]] = []

    def run(self) -> Place | None:
        """The body of the coroutine: the model's forward, without a cache; it gives where the pass stands then."""
        self._model(input_ids=self.batch.token_ids, use_cache=False, **self.batch.inputs)
        return None

    def resume(self, keeping: Collection[tuple[nn.Module, str]] = ()) -> None:
        """Go on until the next pause.

        Args:
            keeping: the attributes that other passes would overwrite where this one pauses inside a segment.
        """
        for (module, name), value in self.state.items():
            setattr(module, name, value)
        self.place = self.switch()
        inside = isinstance(self.place, AtGroup)
        self.state = {(module, name): getattr(module, name) for module, name in keeping} if inside else {}
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
    if not isinstance(current, Pass):
        return
    if isinstance(place, AtSegment):
        current.is_back = place.index in current.been
        current.been.add(place.index)
    if not current.is_back:
        current.parent.switch(place)


def running_pass() -> Pass:
    """The pass that runs the hook that calls this."""
    current = getcurrent()
    if not isinstance(current, Pass):
        raise RuntimeError("no pass is running")
    return current


def is_running() -> bool:
    """Whether a pass runs the hook that calls this, and no run of a segment by itself."""
    return isinstance(getcurrent(), Pass)


def output_of(given: object) -> torch.Tensor:
    """The hidden states among what a segment gives: the first tensor.

    Raises:
        QuantizationError: there is none.
    """
    first = given[0] if isinstance(given, tuple | list) and given else given
    if not isinstance(first, torch.Tensor):
        raise QuantizationError(f"a block gives {type(first).__name__} and no tensor", "leave out tune")
    return first


@contextmanager
def states(segment: nn.Module) -> Iterator[set[tuple[nn.Module, str]]]:
    """The attributes of modules that a run of a segment replaces, such as a recurrence's last state."""
    found: set[tuple[nn.Module, str]] = set()
    before = _plain_attributes(segment)
    yield found
    found.update(each for each, value in _plain_attributes(segment).items() if before.get(each) is not value)


def _plain_attributes(segment: nn.Module) -> dict[tuple[nn.Module, str], torch.Tensor | None]:
    own = ((module, name, value) for module in segment.modules() for name, value in vars(module).items())
    return {(module, name): value for module, name, value in own if value is None or isinstance(value, torch.Tensor)}


@contextmanager
def told(model: nn.Module) -> Iterator[None]:
    """Tell in one line where a model's own code does not run on what it is given."""
    try:
        yield
    except (torch.OutOfMemoryError, QuantkitError):
        raise
    except Exception as error:  # the code of any model, on input that it may not have been written for
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise QuantizationError(
            f"{type(model).__name__} does not run on the calibration rows: {type(error).__name__}: {first}",
            "give records of the kind that the model takes, or a method and bits that need none, such as rtn and 4",
        ) from error


CPU = torch.device("cpu")


def brought(value: Any, device: torch.device) -> Any:
    """Nested tuples, lists and mappings with all tensors on a device; nothing is copied that lies there."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) in (list, tuple):
        return type(value)(brought(each, device) for each in value)
    return {key: brought(each, device) for key, each in value.items()} if type(value) is dict else value
