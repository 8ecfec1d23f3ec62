"""One case of the corpus, and the decorator that puts it there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.bad_inputs.place import Place

Build = Callable[[Place], list[str]]
CASES: dict[str, Case] = {}


@dataclass(frozen=True, slots=True)
class Case:
    """A bad input.

    Attributes:
        name: group and function, such as ``headers.overlapping``.
        build: makes the files and returns the arguments of ``quantkit``.
        expected: stands in the one line of the answer.
    """

    name: str
    build: Build
    expected: str


def case(expected: str) -> Callable[[Build], Build]:
    """Add a builder to the corpus; the group is the name of its module."""

    def add(build: Build) -> Build:
        name = f"{build.__module__.rpartition('.')[2]}.{build.__name__}"
        if name in CASES:
            raise ValueError(f"two cases are called {name}")
        CASES[name] = Case(name, build, expected)
        return build

    return add
