"""The pace of a run: how long its step and the whole of it will still take, from what was expected and measured.

What is expected at the start comes from a short measurement or from earlier runs. As steps go on, their own rate
counts; what takes about as long by unit as one that was measured, such as the same text under another variant, is
expected to take as long as that did; and all else is moved by the factor by which the run was slower or faster so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

SETTLED = 0.5
"""Seconds of a step from which on its rate counts."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """A step that is to come.

    Attributes:
        stage: as it will be announced.
        step: as its progress will be called; empty for what tells none.
        seconds: that it is expected to take.
        like: steps of the same name here take about as long, but for the ratio of their ``seconds``.
    """

    stage: str
    step: str
    seconds: float
    like: str


@runtime_checkable
class Expectant(Protocol):
    """An observer that also wants to know what is to come."""

    def expect(self, ahead: Sequence[Ahead]) -> None:
        """All steps that are to come, in their order; what was said before counts no more."""


def tell_ahead(observer: object, ahead: Sequence[Ahead]) -> None:
    """Tell an observer what is to come, if it wants to know."""
    if isinstance(observer, Expectant):
        observer.expect(ahead)


class Pace:
    """The clock of a run; told what observers are told.

    Args:
        clock: seconds from any moment on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ahead: list[Ahead] = []
        self._measured: dict[str, float] = {}
        self._spent = self._foreseen = 0.0
        self._place = 0
        self._stage, self._step, self._fresh = "", "", True
        self._done = self._total = self._first = 0
        self._begun = self._last = self._opened = clock()

    def expect(self, ahead: Sequence[Ahead]) -> None:
        """What is to come from here on."""
        self._ahead, self._place = list(ahead), 0

    def stage(self, title: str) -> None:
        """A stage begins, and all before it is done with; how the one before closed is measured by the time since."""
        now = self._clock()
        closing = [item for item in self._ahead[self._place :] if item.stage == self._stage]
        if len(closing) == 1 and not closing[0].step:
            self._measure(closing[0], now - self._last)
        self._stage, self._step, self._fresh = title, "", True
        self._last = self._opened = now
        self._place = next(
            (place for place in range(self._place, len(self._ahead)) if self._ahead[place].stage == title), self._place
        )

    def progress(self, step: str, done: int, total: int) -> None:
        """So much of a step is done."""
        now = self._clock()
        if step != self._step or done < self._done:
            self._enter(step, done, total, now)
        self._done, self._total, self._last = done, total, now
        item = self._current()
        if item is None or not item.seconds or (rate := self._rate()) is None:
            return
        self._measured[item.like] = rate * total / item.seconds
        if done == total:
            self._finish(item, now - self._begun)

    def step_left(self) -> float | None:
        """Seconds that the step will still take; None where nothing is known of it, or it is done."""
        if not self._step or self._done == self._total > 0:
            return None
        rate, now = self._rate(), self._clock()
        if rate is not None:
            return max(0.0, rate * (self._total - self._done) - (now - self._last))
        item = self._current()
        return None if item is None else max(0.0, self._expected(item) - (now - self._begun))

    def run_left(self) -> float | None:
        """Seconds that the whole run will still take; None where nothing was expected."""
        rest = self._ahead[self._place :]
        if not rest:
            return None
        later = sum(map(self._expected, rest[1:]))
        if self._current() is not None:
            return (self.step_left() or 0.0) + later
        waited = self._clock() - self._last if rest[0].stage == self._stage else 0.0
        return max(0.0, self._expected(rest[0]) - waited) + later

    def is_rough(self) -> bool:
        """Whether less than half of what is left is like something that was measured in this run."""
        rest = self._ahead[self._place :]
        known = sum(self._expected(item) for item in rest if item.like in self._measured)
        return known < 0.5 * sum(map(self._expected, rest))

    def _enter(self, step: str, done: int, total: int, now: float) -> None:
        """A step begins; the one before it that told nothing is measured by the time that went by.

        One that is heard of at its end alone began when the one before ended; the first of a stage that is heard of
        after one unit, or that is expected first and has nothing done yet, began with the stage; others began when
        they are heard of.
        """
        whole = done == total or (done == 1 and self._fresh)
        self._step, self._first = step, 0 if whole else done
        self._begun = self._last if whole else now
        self._fresh = False
        place = next((p for p in range(self._place, len(self._ahead)) if self._is(p, step)), None)
        if place is None:
            return
        silent = [item for item in self._ahead[self._place : place] if not item.step]
        if len(silent) == 1 and done == 0:
            self._measure(silent[0], now - self._last)
        if done == 0 and (place == 0 or self._ahead[place - 1].stage != self._stage):
            self._begun = self._opened
        self._place = place

    def _measure(self, silent: Ahead, seconds: float) -> None:
        """What told nothing took so long."""
        if silent.seconds:
            self._measured[silent.like] = seconds / silent.seconds

    def _is(self, place: int, step: str) -> bool:
        return self._ahead[place].stage == self._stage and self._ahead[place].step == step

    def _current(self) -> Ahead | None:
        """The expected step that is going on."""
        at = self._place
        return self._ahead[at] if at < len(self._ahead) and self._step and self._is(at, self._step) else None

    def _rate(self) -> float | None:
        """Seconds a unit of the step; None where too little is done."""
        units, spent = self._done - self._first, self._last - self._begun
        return spent / units if units > 0 and (spent >= SETTLED or self._done == self._total) else None

    def _expected(self, item: Ahead) -> float:
        usual = self._spent / self._foreseen if self._foreseen else 1.0
        return item.seconds * self._measured.get(item.like, usual)

    def _finish(self, item: Ahead, seconds: float) -> None:
        self._spent += seconds
        self._foreseen += item.seconds
        self._place += 1
        self._step, self._done = "", 0


def about(seconds: float) -> str:
    """A length of time to come, in as few digits as it deserves: ``20 s``, ``4 min``, ``2 h 10 min``."""
    if seconds < 90:
        return f"{max(5, round(seconds / 5) * 5)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, rest = divmod(round(minutes / 10) * 10, 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"
