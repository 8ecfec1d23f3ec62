"""How long work tells what it is doing."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Is told of stages and their progress; see :mod:`quantkit.display` for the one of the command line."""

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
