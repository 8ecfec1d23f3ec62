"""The difference of two figures, and how large it would be by chance.

Two runs are scored on the same windows, so what varies between texts falls out of their paired differences. All
differences are shares of the second figure and positive where the first is worse; intervals are at 95 %, from Student's
t over windows or repetitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, variance

CONFIDENCE = 0.95
POWER = 0.80
LARGE = 200
"""Degrees of freedom from which the normal distribution stands for t: the two differ by less than 0.7 %."""
_UPPER = (1 + CONFIDENCE) / 2


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference and its noise.

    Attributes:
        value: by how much the first figure is worse, as a share of the second.
        low, high: its 95 % interval; None where the noise is not known.
        detectable: the smallest true worsening that is found in four runs of five.
        samples: windows or repetitions.
    """

    value: float
    low: float | None = None
    high: float | None = None
    detectable: float | None = None
    samples: int = 0

    @property
    def is_worse(self) -> bool | None:
        """Whether the worsening lies outside its noise; None where that is not known."""
        return None if self.low is None else self.low > 0


@dataclass(frozen=True, slots=True)
class Spread:
    """How much a speed differs from run to run, which repetitions within a run do not show.

    Attributes:
        deviation: standard deviation of its logarithm.
        degrees: of freedom: the runs that this is told from, less one.
    """

    deviation: float
    degrees: int


def exact(now: float, then: float, *, lower_is_better: bool) -> Difference:
    """The difference of two figures without noise, such as sizes."""
    share = _share(now, then, lower_is_better)
    return Difference(share, share, share, 0.0)


def unknown(now: float, then: float, *, lower_is_better: bool) -> Difference:
    """The difference of two figures whose noise is not known."""
    return Difference(_share(now, then, lower_is_better))


def of_likelihoods(now: Sequence[float], then: Sequence[float], tokens: int) -> Difference:
    """The difference of two perplexities, from the negative log-likelihoods of the same windows.

    Args:
        now, then: sums over each window, nats.
        tokens: scored tokens in a window.
    """
    apart = [(first - second) / tokens for first, second in zip(now, then, strict=True)]
    middle = fmean(apart)
    return _around(middle, _stderr(apart), len(apart) - 1, len(apart), _growth)


def of_ratios(now: Sequence[float], then: Sequence[float], *, lower_is_better: bool) -> Difference:
    """The difference of two means over the same windows, as a share of the second.

    The standard error is that of a ratio estimator: from the residuals ``now - ratio * then`` (Cochran 1977, "Sampling
    techniques", section 6.4).

    Raises:
        ZeroDivisionError: the second is zero.
    """
    total = math.fsum(then)
    ratio = math.fsum(now) / total
    residuals = [first - ratio * second for first, second in zip(now, then, strict=True)]
    spread = _stderr(residuals)
    stderr = None if spread is None else spread * len(residuals) / abs(total)
    middle = ratio - 1 if lower_is_better else 1 - ratio
    return _around(middle, stderr, len(residuals) - 1, len(residuals))


def of_timings(
    now: float, then: float, samples: Sequence[float], samples_then: Sequence[float], spread: Spread | None = None
) -> Difference:
    """The difference of two speeds, from the times of their repetitions (Welch's test on logarithms).

    Args:
        now, then: tokens per second.
        samples, samples_then: seconds per token of each repetition.
        spread: from run to run; None for two that were taken in the same run.
    """
    middle = math.log(then / now)
    logs = [[math.log(each) for each in given] for given in (samples, samples_then)]
    if min(map(len, logs)) < 2:
        return Difference(-math.expm1(-middle))
    parts = [variance(each) / len(each) for each in logs]
    within = sum(parts)
    degrees = 1 if not within else int(within**2 / sum(p**2 / (len(e) - 1) for p, e in zip(parts, logs, strict=True)))
    stderr = math.sqrt(within)
    if spread is not None and math.sqrt(2) * spread.deviation > stderr:
        stderr, degrees = math.sqrt(2) * spread.deviation, spread.degrees
    count = sum(map(len, logs))
    return _around(middle, stderr, max(1, degrees), count, lambda value: -math.expm1(-value))


def of_stderrs(now: float, then: float, stderr: float, stderr_then: float, *, lower_is_better: bool) -> Difference:
    """The difference of two independent figures, from their standard errors."""
    spread = math.hypot(stderr, stderr_then) / abs(then)
    return _around(_share(now, then, lower_is_better), spread, 10**6, 0)


def _around(
    middle: float,
    stderr: float | None,
    degrees: int,
    samples: int,
    change: Callable[[float], float] = float,
) -> Difference:
    """The difference with its interval, which is symmetric before ``change`` makes shares of it."""
    if stderr is None:
        return Difference(change(middle), samples=samples)
    half = t_quantile(_UPPER, degrees) * stderr
    found = half + t_quantile(POWER, degrees) * stderr
    return Difference(change(middle), change(middle - half), change(middle + half), change(found), samples)


def _growth(exponent: float) -> float:
    try:
        return math.expm1(exponent)
    except OverflowError:
        return math.inf


def _stderr(values: Sequence[float]) -> float | None:
    return math.sqrt(variance(values) / len(values)) if len(values) > 1 else None


def _share(now: float, then: float, lower_is_better: bool) -> float:
    return (now / then - 1) if lower_is_better else (1 - now / then)


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
