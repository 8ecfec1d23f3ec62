"""How long work tells what it is doing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic
from typing import Protocol, runtime_checkable

from quantkit.system.pace import Ahead, tell_ahead

LOGGER = logging.getLogger("quantkit")


class Observer(Protocol):
    """Is told of stages and their progress; see :mod:`quantkit.cli.display` for the one of the command line."""

    def stage(self, title: str) -> None:
        """A stage begins; the one before has ended."""

    def progress(self, step: str, done: int, total: int) -> None:
        """Within the stage: ``done`` of ``total`` of a step such as ``block``."""

    def note(self, text: str) -> None:
        """Something that the user should read."""


class Row(Observer, Protocol):
    """An observer of one piece of work among others that go on at the same time."""

    def placed(self, host: str) -> None:
        """It has begun, on a machine of this name."""

    def close(self) -> None:
        """It has ended, one way or the other."""


@runtime_checkable
class Tabular(Protocol):
    """An observer that shows work that goes on at the same time as rows of a table."""

    def row(self, title: str) -> Row:
        """A row for a piece of work."""


def row_of(observer: Observer, title: str) -> Row:
    """A row for a piece of work; where an observer has no table, notes that name it."""
    return observer.row(title) if isinstance(observer, Tabular) else _Noted(observer, title)


class _Noted:
    """A row in notes."""

    def __init__(self, observer: Observer, title: str) -> None:
        self._observer, self._title, self._begun = observer, title, monotonic()

    def stage(self, title: str) -> None:
        self.note(title)

    def progress(self, step: str, done: int, total: int) -> None:
        self._observer.progress(f"{self._title}: {step}", done, total)

    def note(self, text: str) -> None:
        start, mark, rest = text.partition("warning: ")
        self._observer.note(f"warning: {self._title}: {rest}" if mark and not start else f"{self._title}: {text}")

    def placed(self, host: str) -> None:
        self._begun = monotonic()
        self.note(f"on {host}")

    def close(self) -> None:
        self.note(f"ended after {monotonic() - self._begun:.1f} s")


class _Rows:
    """The rows that several observers have for one piece of work."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def stage(self, title: str) -> None:
        for each in self._rows:
            each.stage(title)

    def progress(self, step: str, done: int, total: int) -> None:
        for each in self._rows:
            each.progress(step, done, total)

    def note(self, text: str) -> None:
        for each in self._rows:
            each.note(text)

    def placed(self, host: str) -> None:
        for each in self._rows:
            each.placed(host)

    def close(self) -> None:
        for each in self._rows:
            each.close()


class Silent:
    """An observer that tells nobody."""

    def stage(self, title: str) -> None:
        """Ignore it."""

    def progress(self, step: str, done: int, total: int) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""


class Logged:
    """An observer that tells the logger ``quantkit``: stages and notes at INFO, warnings at WARNING, steps at DEBUG."""

    def stage(self, title: str) -> None:
        """Log it."""
        LOGGER.info("%s", title)

    def progress(self, step: str, done: int, total: int) -> None:
        """Log it."""
        LOGGER.debug("%s %d/%d", step, done, total)

    def note(self, text: str) -> None:
        """Log it."""
        level = logging.WARNING if text.lstrip().startswith("warning") else logging.INFO
        LOGGER.log(level, "%s", text)


class Several:
    """An observer that tells others.

    Args:
        observers: are told in this order.
    """

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def stage(self, title: str) -> None:
        """Tell all."""
        for each in self._observers:
            each.stage(title)

    def progress(self, step: str, done: int, total: int) -> None:
        """Tell all."""
        for each in self._observers:
            each.progress(step, done, total)

    def note(self, text: str) -> None:
        """Tell all."""
        for each in self._observers:
            each.note(text)

    def expect(self, ahead: Sequence[Ahead]) -> None:
        """Tell those that want to know."""
        for each in self._observers:
            tell_ahead(each, ahead)

    def row(self, title: str) -> Row:
        """A row with each."""
        return _Rows([row_of(each, title) for each in self._observers])


class Named:
    """An observer that tells another, with a name before each stage and note: for one of several runs.

    Args:
        observer: it.
        name: of the run.
    """

    def __init__(self, observer: Observer, name: str) -> None:
        self._observer, self._name = observer, name

    def stage(self, title: str) -> None:
        """Tell it."""
        self._observer.stage(f"{self._name}: {title}")

    def progress(self, step: str, done: int, total: int) -> None:
        """Tell it."""
        self._observer.progress(step, done, total)

    def note(self, text: str) -> None:
        """Tell it; a warning stays one."""
        start, mark, rest = text.partition("warning: ")
        self._observer.note(f"warning: {self._name}: {rest}" if mark and not start else f"{self._name}: {text}")

    def expect(self, ahead: Sequence[Ahead]) -> None:
        """Tell it, if it wants to know."""
        tell_ahead(self._observer, [replace(each, stage=f"{self._name}: {each.stage}") for each in ahead])

    def row(self, title: str) -> Row:
        """A row with it."""
        return row_of(self._observer, f"{self._name}: {title}")


class Among:
    """An observer for one of several threads: what is no row is a note, as no stage closes another's.

    Args:
        observer: is told.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def stage(self, title: str) -> None:
        """Tell it in a note."""
        self._observer.note(f"{title} ...")

    def progress(self, step: str, done: int, total: int) -> None:
        """Of what is done here meanwhile, which is little."""

    def note(self, text: str) -> None:
        """Tell it."""
        self._observer.note(text)

    def row(self, title: str) -> Row:
        """A row with it."""
        return row_of(self._observer, title)
