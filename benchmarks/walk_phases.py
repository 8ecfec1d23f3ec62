"""Where the seconds of a walk go: functions of the engine are timed while a block runs, each without the others.

Used by the comparisons beside it. Processor seconds are those of all threads of this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from quantkit.engine import mismatch, passes, skeleton, solver, statistics, streams
from quantkit.quantization import solved_layers, variant

OTHER = "other"
PLACES: tuple[tuple[Any, str, str], ...] = (
    (skeleton.Skeleton, "load", "reading"),
    (skeleton.Skeleton, "load_frame", "reading"),
    (passes.Pass, "resume", "passes"),
    (streams.Streams, "try_alone", "trials"),
    (statistics.Gatherer, "add", "sums"),
    (statistics.Gatherer, "result", "sums"),
    (mismatch.MismatchGatherer, "add", "sums"),
    (mismatch.MismatchGatherer, "see", "sums"),
    (mismatch.MismatchGatherer, "result", "sums"),
    (solver.Solver, "solve", "solving"),
    (solved_layers.SolvedLayers, "take", "packing"),
    (variant.VariantRun, "finish", "writing"),
)
"""Class, method, and the phase that its time counts to."""


@dataclass(slots=True)
class Phases:
    """What each phase took, seconds and processor seconds; what a phase calls of another counts there alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)
    stack: list[str] = field(default_factory=lambda: [OTHER])
    _then: tuple[float, float] = field(default_factory=lambda: (time.perf_counter(), time.process_time()))

    @property
    def current(self) -> str:
        """The phase that runs."""
        return self.stack[-1]

    def switch(self) -> None:
        """Count what passed since the last call to the current phase."""
        now = time.perf_counter(), time.process_time()
        for spent, since, until in zip((self.seconds, self.processor), self._then, now, strict=True):
            spent[self.current] = spent.get(self.current, 0.0) + until - since
        self._then = now


@contextmanager
def phases() -> Iterator[Phases]:
    """Inside the block, phases of walks are timed."""
    found = Phases()
    with ExitStack() as patches:
        for owner, name, phase in PLACES:
            patches.enter_context(mock.patch.object(owner, name, _timed(getattr(owner, name), phase, found)))
        yield found
        found.switch()


def _timed(function: Callable[..., Any], phase: str, found: Phases) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        found.switch()
        found.stack.append(phase)
        try:
            return function(*args, **kwargs)
        finally:
            found.switch()
            found.stack.pop()

    return timed
