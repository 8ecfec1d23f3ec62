"""A request to stop that long work heeds at its next good moment.

Whoever handles signals calls :func:`request`; long work says with :func:`patient` that it will look, and calls
:func:`heed` where all that was done is saved. Nothing here installs a handler.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EXIT_TERMINATED = 143


class Terminated(SystemExit):
    """Work has ended because it was asked to; what was done is saved."""

    def __init__(self) -> None:
        super().__init__(EXIT_TERMINATED)


@dataclass(slots=True)
class _Wish:
    """Whether somebody asked, and how many are looking."""

    asked: bool = False
    looking: int = 0


_wish = _Wish()


def request() -> bool:
    """Ask the work under way to stop; false where nothing under way will look, or it was asked before."""
    if not _wish.looking or _wish.asked:
        return False
    _wish.asked = True
    return True


def heed() -> None:
    """Stop here if somebody asked.

    Raises:
        Terminated: somebody did.
    """
    if _wish.asked:
        raise Terminated


@contextmanager
def patient() -> Iterator[None]:
    """Inside the block requests to stop wait for :func:`heed`, or for the end of the block."""
    _wish.looking += 1
    try:
        yield
        heed()
    finally:
        _wish.looking -= 1
        if not _wish.looking:
            _wish.asked = False
