"""Quantiles of Student's t, for intervals from few samples."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

CONFIDENCE = 0.95
POWER = 0.80
LARGE = 200
"""Degrees of freedom from which the normal distribution stands for t: the two differ by less than 0.7 %."""


@lru_cache(maxsize=256)
def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of t with whole degrees of freedom.

    Args:
        probability: 0.5 or more, below 1.
        degrees: 1 or more.
    """
    if degrees >= LARGE:
        return NormalDist().inv_cdf(probability)
    low, high = 0.0, 1.0
    while _cdf(high, degrees) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _cdf(t: float, degrees: int) -> float:
    """Probability up to ``t >= 0``, by the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for step in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (step - 1) / step
        total += term
    between = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + between / 2
