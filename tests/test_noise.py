"""Intervals of differences: what they hold, how often they are wrong, and what they find."""

from __future__ import annotations

import math
import random

import pytest

from quantkit.gates import noise
from quantkit.gates.noise import t_quantile

WINDOWS = 16
TRIES = 2000


@pytest.mark.parametrize(
    ("probability", "degrees", "quantile"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 3, 3.18245),
        (0.975, 15, 2.13145),
        (0.975, 30, 2.04227),
        (0.80, 1, 1.37638),
        (0.80, 15, 0.86624),
        (0.975, 10**6, 1.95996),
    ],
)
def test_the_quantiles_of_t_are_those_of_the_tables(probability: float, degrees: int, quantile: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(quantile, rel=1e-5)


def windows(draw: random.Random, worse: float = 0.0, spread: float = 2.0) -> tuple[list[float], list[float]]:
    """Sums over windows that differ much from text to text and little from run to run."""
    texts = [100 + 30 * draw.gauss(0, 1) for _ in range(WINDOWS)]
    return [each * (1 + worse) + draw.gauss(0, spread) for each in texts], texts


def test_differences_by_chance_are_rarely_called_worse() -> None:
    draw = random.Random(0)
    alarms = sum(noise.of_ratios(*windows(draw), lower_is_better=True).is_worse is True for _ in range(TRIES))
    assert alarms / TRIES == pytest.approx(0.025, abs=0.012)
    draw = random.Random(1)
    alarms = sum(noise.of_likelihoods(*windows(draw), 63).is_worse is True for _ in range(TRIES))
    assert alarms / TRIES == pytest.approx(0.025, abs=0.012)


def test_what_is_called_detectable_is_found_in_four_runs_of_five() -> None:
    draw = random.Random(2)
    detectable = sorted(noise.of_ratios(*windows(draw), lower_is_better=True).detectable or 0.0 for _ in range(TRIES))[
        TRIES // 2
    ]
    found = sum(
        noise.of_ratios(*windows(draw, worse=detectable), lower_is_better=True).is_worse is True for _ in range(TRIES)
    )
    assert found / TRIES == pytest.approx(0.80, abs=0.05)


def test_pairs_of_windows_tell_far_less_than_two_separate_means_could() -> None:
    draw = random.Random(3)
    now, then = windows(draw, worse=0.03)
    paired = noise.of_ratios(now, then, lower_is_better=True)
    assert paired.is_worse
    mean, deviation = sum(then) / WINDOWS, 30 / math.sqrt(WINDOWS)
    apart = noise.of_stderrs(sum(now) / WINDOWS, mean, deviation, deviation, lower_is_better=True)
    assert apart.is_worse is False
    assert (apart.detectable or 0.0) > 5 * (paired.detectable or 0.0)


def test_a_perplexity_is_compared_as_a_ratio() -> None:
    then = [63 * 2.0] * 4
    now = [63 * (2.0 + each) for each in (0.09, 0.11, 0.10, 0.10)]
    found = noise.of_likelihoods(now, then, 63)
    assert found.value == pytest.approx(math.exp(0.10) - 1)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert found.samples == 4


def test_a_share_that_falls_is_worse() -> None:
    found = noise.of_ratios([40, 41, 39, 40], [50, 51, 50, 49], lower_is_better=False)
    assert found.value == pytest.approx(0.2)
    assert found.is_worse


def test_the_noise_of_one_window_is_not_known() -> None:
    found = noise.of_likelihoods([120.0], [100.0], 63)
    assert (found.is_worse, found.low, found.detectable) == (None, None, None)
    assert found.value > 0


def test_identical_windows_leave_nothing_undetected() -> None:
    found = noise.of_ratios([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], lower_is_better=True)
    assert (found.value, found.low, found.high, found.detectable) == (0.0, 0.0, 0.0, 0.0)


def test_a_slower_model_is_worse_by_the_share_of_its_speed() -> None:
    samples = [0.0100, 0.0101, 0.0099, 0.0100], [0.0080, 0.0081, 0.0079, 0.0080]
    found = noise.of_timings(100.0, 125.0, *samples)
    assert found.value == pytest.approx(0.2)
    assert found.is_worse
    loud = noise.of_timings(100.0, 125.0, *samples, noise.Spread(0.15, 9))
    assert loud.is_worse is False
    assert loud.value == found.value


def test_the_spread_between_runs_does_not_hide_that_within_one() -> None:
    samples = [0.01, 0.02, 0.005, 0.011], [0.01, 0.009, 0.02, 0.01]
    within = noise.of_timings(100.0, 125.0, *samples)
    assert noise.of_timings(100.0, 125.0, *samples, noise.Spread(0.001, 9)) == within


def test_a_model_that_is_destroyed_is_worse_without_bound() -> None:
    found = noise.of_likelihoods([63 * 900.0, 63 * 950.0], [63 * 2.0, 63 * 2.1], 63)
    assert found.value == math.inf
    assert found.is_worse
