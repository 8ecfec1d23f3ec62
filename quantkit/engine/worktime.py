"""What of a walk's time is each task's own work, on a GPU too, which is waited for when the figures are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from quantkit.system.devices import Moment


@dataclass(frozen=True, slots=True)
class Spent:
    """What was spent when the walk came to a segment.

    Attributes:
        own: by name the seconds of each task.
        since: that moment.
        device: of the walk.
    """

    own: Mapping[str, float]
    since: Moment
    device: torch.device

    def elapsed(self) -> float:
        """Seconds since then, in all."""
        return self.since.seconds_until(Moment.now(self.device))


@dataclass(slots=True)
class WorkTime:
    """The seconds of each task.

    Args:
        device: of the walk.
    """

    device: torch.device
    _seconds: dict[str, float] = field(init=False, default_factory=dict)
    _timed: list[tuple[str, Moment, Moment]] = field(init=False, default_factory=list)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Inside the block, a task does its own work; what the passes still have to do on a GPU is not counted."""
        started = Moment.now(self.device)
        try:
            yield
        finally:
            self._timed.append((name, started, Moment.now(self.device)))

    def seconds(self) -> dict[str, float]:
        """By name what each task's own work took so far; a GPU is waited for."""
        timed, self._timed = self._timed, []
        for name, start, stop in timed:
            self._seconds[name] = self._seconds.get(name, 0.0) + start.seconds_until(stop)
        return dict(self._seconds)

    def clock(self) -> Spent:
        """Starts to count what is spent on a segment."""
        return Spent(self.seconds(), Moment.now(self.device), self.device)
