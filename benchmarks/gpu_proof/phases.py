"""Where the time of a quantizing run goes: functions of the walk are timed, each without those inside it.

The device is waited for before and after each, so that a phase has what it asked for. What overlaps otherwise does not
overlap then, and such a run is somewhat slower than one without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from importlib import import_module
from typing import Any

import torch

from quantkit.system.devices import synchronize

WATCHED = {
    "quantkit.engine.skeleton:Skeleton.load": "load",
    "quantkit.engine.skeleton:Skeleton.load_frame": "load",
    "quantkit.engine.transforming:Originals.weight": "load",
    "quantkit.engine.statistics:Gatherer.add": "Grams",
    "quantkit.engine.statistics:Gatherer.result": "Grams",
    "quantkit.engine.mismatch:MismatchGatherer.add": "Grams of what was lost",
    "quantkit.engine.mismatch:MismatchGatherer.result": "Grams of what was lost",
    "quantkit.engine.solver:Solver.solve": "solve",
    "quantkit.engine.solve:corrected": "correct",
    "quantkit.quantization.solved_layers:SolvedLayers.take": "pack",
    "quantkit.quantization.solved_layers:SolvedLayers.segment_done": "store",
    "quantkit.quantization.solved_layers:SolvedLayers.settle": "store",
    "quantkit.quantization.solved_variant:write_export": "write",
}
"""What is timed, as ``module:name``, and as which phase it counts."""
REST = "forward and the rest"


@dataclass(slots=True)
class Clock:
    """Seconds by phase; those of what runs inside a phase are not the outer one's.

    Args:
        device: it is waited for at each change.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    _open: list[str] = field(default_factory=lambda: [REST])
    _since: float = field(default_factory=time.perf_counter)

    def _charge(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside counts as this phase."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()


@contextmanager
def timed(device: torch.device) -> Iterator[Clock]:
    """Time what :data:`WATCHED` names while a run lasts.

    Raises:
        AttributeError: there is no such function any more.
    """
    clock = Clock(device)
    kept: list[tuple[Any, str, Callable[..., Any]]] = []
    try:
        for place, phase in WATCHED.items():
            module, _, path = place.partition(":")
            owner, name = import_module(module), path
            if "." in path:
                held, _, name = path.partition(".")
                owner = getattr(owner, held)
            kept.append((owner, name, getattr(owner, name)))
            setattr(owner, name, _watched(clock, phase, getattr(owner, name)))
        yield clock
        with clock.phase(REST):
            pass  # what was done since the last change counts
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def _watched(clock: Clock, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        with clock.phase(phase):
            return function(*given, **named)

    return call
