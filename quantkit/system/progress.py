"""How long work tells what it is doing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

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
