"""What an estimate is made of: lines of bytes, each with the formula that it follows from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from quantkit.errors import RecipeError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


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


def parse_bytes(text: str | int) -> int:
    """A size such as ``8GiB``, ``600MiB`` or a number of bytes.

    Raises:
        RecipeError: it is none.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(text))
    units = {unit.lower(): size for unit, size in UNITS.items()}
    try:
        if match is None or match[2].lower() not in units:
            raise InvalidOperation
        return int(Decimal(match[1]) * units[match[2].lower()])
    except InvalidOperation as error:
        raise RecipeError(f"'{text}' is not a size", "write a number and a unit, such as 8GiB or 600MiB") from error


def written(count: float) -> str:
    """A whole number with separators, others with as many digits as they need."""
    return f"{count:,.0f}" if float(count).is_integer() else f"{count:,.5g}"


def in_units(nbytes: int) -> str:
    """Bytes in the largest unit that leaves a number before the point."""
    for unit in ("GiB", "MiB", "KiB"):
        if abs(nbytes) >= UNITS[unit]:
            return f"{nbytes / UNITS[unit]:.2f} {unit}"
    return f"{nbytes} B"
