"""Numbers as they are written: finite or not there, with the decimals and the unit of their whole column."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from quantkit.system.units import finite

ABSENT = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
BYTE_STEPS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def pick(data: Any, *path: str) -> Any:
    """What lies at ``path`` in nested mappings, or None as soon as something is not there."""
    for key in path:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data


def figure(data: Any, *path: str) -> float | None:
    """The finite number at ``path``, or None."""
    return finite(pick(data, *path))


def fixed(value: float | None, decimals: int) -> str:
    """``value`` with thousands separators and a true minus sign."""
    return ABSENT if value is None else f"{value:,.{decimals}f}".replace("-", MINUS)


def margin(stderr: float, decimals: int) -> str:
    """A standard error to as many decimals as its figure; never as zero unless it is."""
    least = 10.0**-decimals
    return f"± <{fixed(least, decimals)}" if 0 < stderr < least / 2 else f"± {fixed(stderr, decimals)}"


def signed(value: float | None, decimals: int, unit: str = "") -> str:
    """``value`` with its sign always shown."""
    return ABSENT if value is None else f"{value:+,.{decimals}f}{unit}".replace("-", MINUS)


def percent(share: float | None, decimals: int = 1) -> str:
    """A share as a percentage."""
    return ABSENT if share is None else f"{fixed(100 * share, decimals)}%"


def significant(value: float | None, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits."""
    return ABSENT if value is None else f"{value:,.{digits}g}".replace("-", MINUS)


def padded(value: float | None, digits: int = 3) -> str:
    """``value`` with exactly ``digits`` significant digits, zeros at the end included."""
    return ABSENT if value is None else f"{value:#.{digits}g}".removesuffix(".").replace("-", MINUS)


def count(value: Any) -> str:
    """A whole number with thousands separators."""
    number = finite(value)
    return ABSENT if number is None else fixed(number, 0)


def decimals_for(values: Iterable[float | None], digits: int = 2, least: int = 2, most: int = 6) -> int:
    """Decimals that show ``digits`` significant digits of the smallest non-zero value."""
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return least
    return max(least, min(most, digits - 1 - math.floor(math.log10(min(sizes)))))


def byte_unit(values: Iterable[float | None]) -> tuple[str, int]:
    """The binary unit that suits a column of bytes: its name and its bytes."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return next(((name, size) for name, size in BYTE_STEPS if largest >= size), BYTE_STEPS[-1])


def in_bytes(value: float | None) -> str:
    """A number of bytes in the unit that suits it."""
    if value is None:
        return ABSENT
    name, size = byte_unit([value])
    return f"{fixed(value / size, 0 if size == 1 else 1)} {name}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: ``8.4 s``, ``2 min 05 s``, ``1 h 03 min``."""
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{fixed(seconds, 1)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def parameters(value: float | None) -> str:
    """A number of parameters: ``134.5 M``, ``70.6 B``."""
    if value is None:
        return ABSENT
    for name, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {name}"
    return count(value)
