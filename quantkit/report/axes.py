"""Axes of a plot: from figures to pixels, with ticks that people like to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Frame:
    """Where figures are drawn, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def holds(self, place: tuple[float, float], margin: float) -> bool:
        """Whether ``place`` lies inside, at least ``margin`` from the edge."""
        across, down = place
        return self.left + margin <= across <= self.right - margin and self.top + margin <= down <= self.bottom - margin


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear or logarithmic axis.

    Attributes:
        low, high: figures at the two ends.
        start, stop: pixels of the two ends.
        log: whether equal ratios take equal lengths.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of ``value``; what lies outside is put at the end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Pixels and labels of the ticks."""
        values = _log_ticks(self.low, self.high) if self.log else _even_ticks(self.low, self.high)
        return [(self(value), _label(value, values)) for value in values]


def linear_axis(values: Sequence[float], start: float, stop: float) -> Axis:
    """An axis with a margin around ``values``."""
    low, high = min(values), max(values)
    margin = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(max(0.0, low - margin) if low >= 0 else low - margin, high + margin, start, stop)


def log_axis(values: Sequence[float], start: float, stop: float) -> Axis:
    """A logarithmic axis with a margin around ``values``, all of which are positive."""
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.13, 1.2)
    return Axis(low / margin, high * margin, start, stop, log=True)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = [step * 10.0**power for power in decades for step in steps]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            return inside
    return inside if len(inside) >= 3 else _even_ticks(low, high)


def _even_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 7
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _label(value: float, values: Sequence[float]) -> str:
    if value and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.2g}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")
    gaps = [after - before for before, after in pairwise(values)]
    even = gaps and max(gaps) < 1.01 * min(gaps)
    return f"{value:.{_decimals(min(gaps))}f}" if even else f"{value:.4g}"


def _decimals(step: float) -> int:
    for decimals in range(8):
        if abs(round(step, decimals) - step) < 1e-6 * step:
            return decimals
    return 8
