"""What an estimate is made of: lines of bytes, each with the formula that it follows from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Line:
    """One part of an estimate.

    Attributes:
        name: what it is.
        nbytes: how much it takes.
        formula: how that comes about, with the numbers put in.
    """

    name: str
    nbytes: int
    formula: str

    def to_json(self) -> dict[str, Any]:
        """``name``, ``bytes`` and ``formula``."""
        return {"name": self.name, "bytes": self.nbytes, "formula": self.formula}


@dataclass(frozen=True, slots=True)
class Part:
    """Lines that are there at one time, and so add up.

    Attributes:
        name: a short one, for programs.
        title: what it answers.
        lines: what there is.
        notes: what someone should know who reads it.
    """

    name: str
    title: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The sum of its lines."""
        return sum(line.nbytes for line in self.lines)

    def line(self, name: str) -> Line:
        """The line of a name."""
        return next(line for line in self.lines if line.name == name)

    def to_json(self) -> dict[str, Any]:
        """``name``, ``title``, ``bytes``, ``lines`` and ``notes``."""
        return {
            "name": self.name,
            "title": self.title,
            "bytes": self.nbytes,
            "lines": [line.to_json() for line in self.lines],
            "notes": list(self.notes),
        }


def largest(parts: Sequence[Part]) -> Part:
    """The part that takes most."""
    return max(parts, key=lambda part: part.nbytes)


def written(count: float) -> str:
    """A whole number with separators, others with as many digits as they need."""
    return f"{count:,.0f}" if float(count).is_integer() else f"{count:,.5g}"
