"""Numbers that may not be finite, sizes in bytes and lengths of time: read as people write them, and written."""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation
from typing import Any

from quantkit.errors import RecipeError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def finite(value: Any) -> float | None:
    """``value`` as a float, or None if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percentage(share: float) -> str:
    """A share as people read it, such as ``97.4%``; what is not all is never written as 100%, nor a little as 0%."""
    if 0 < share < 0.001:
        return "under 0.1%"
    return f"{share if share >= 1 else min(share, 0.999):.1%}".replace(".0%", "%")


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


def parse_seconds(text: object) -> float:
    """Seconds from ``90s``, ``1.5min``, ``2h`` or ``1d``.

    Raises:
        RecipeError: it is nothing of the kind, or no time at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", text) if isinstance(text, str) else None
    seconds = float(found[1]) * SECONDS[found[2]] if found else 0.0
    if seconds <= 0:
        raise RecipeError(f"'{text}' is no length of time", "write 90s, 30min or 2h, for one")
    return seconds


def in_units(nbytes: int) -> str:
    """Bytes in the largest unit that leaves a number before the point."""
    for unit in ("GiB", "MiB", "KiB"):
        if abs(nbytes) >= UNITS[unit]:
            return f"{nbytes / UNITS[unit]:.2f} {unit}"
    return f"{nbytes} B"
