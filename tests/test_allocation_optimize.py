"""The choice of least cost within a room: as brute force finds it, and quickly for models of thousands of units."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

from quantkit.allocation import optimize
from quantkit.allocation.optimize import best, choose
from quantkit.allocation.table import Unit
from quantkit.errors import QuantizationError, SchemeError

NAMES = tuple("abcdefgh")


def _units(seed: int, count: int, choices: int, step: int = 1) -> list[Unit]:
    """Units as layers give them: more bytes cost less, by no smooth law; some have fewer choices."""
    random = np.random.default_rng(seed)
    found = []
    for index in range(count):
        names = NAMES[: max(1, choices - int(random.integers(0, 2)))]
        weights = int(random.integers(1, 40)) * 16
        bits = np.sort(random.uniform(2, 9, len(names)))
        costs = random.lognormal(0, 1.5) * 4.0**-bits * random.uniform(0.4, 1.6, len(names))
        sizes = [step * round(weights * each / 8 / step) for each in bits]
        found.append(
            Unit(
                (f"layer.{index}",),
                weights,
                dict(zip(names, map(float, costs), strict=True)),
                dict(zip(names, sizes, strict=True)),
            )
        )
    return found


def _totals(units: list[Unit], chosen: tuple[str, ...]) -> tuple[int, float]:
    pairs = list(zip(units, chosen, strict=True))
    return sum(unit.sizes[name] for unit, name in pairs), sum(unit.costs[name] for unit, name in pairs)


def _brute(units: list[Unit], room: int) -> float:
    totals = (_totals(units, chosen) for chosen in itertools.product(*(unit.costs for unit in units)))
    return min((cost for size, cost in totals if size <= room), default=math.inf)


def _least(units: list[Unit]) -> int:
    return sum(min(unit.sizes.values()) for unit in units)


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_within_the_room_costs_less(seed: int) -> None:
    units = _units(seed, 1 + seed % 6, 2 + seed % 4, step=(1, 8, 64)[seed % 3])
    most = sum(max(unit.sizes.values()) for unit in units)
    for room in np.linspace(_least(units), most + 5, 7).astype(int):
        found = best(units, int(room))
        size, cost = _totals(units, found.chosen)
        assert size <= room
        assert cost == pytest.approx(_brute(units, int(room)), rel=1e-8)
        assert found.cost == pytest.approx(cost)
        assert found.bound == pytest.approx(cost, rel=1e-8)


def test_costs_that_tie_or_lie_on_a_line_are_no_trouble() -> None:
    alike = [Unit((f"l{i}",), 8, {"a": 3.0, "b": 2.0, "c": 1.0}, {"a": 10, "b": 20, "c": 30}) for i in range(6)]
    for room in range(60, 190, 7):
        assert _totals(alike, choose(alike, room))[1] == _brute(alike, room)


def test_a_choice_that_is_larger_and_worse_is_never_taken() -> None:
    units = [Unit(("l",), 8, {"small": 1.0, "large": 1.5}, {"small": 10, "large": 20})]
    assert choose(units, 1000) == ("small",)


def test_more_room_never_costs_more() -> None:
    units = _units(5, 60, 8)
    costs = [best(units, room).cost for room in range(_least(units), 2 * _least(units), 37)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(costs))
    assert costs[-1] < costs[0] / 3


def test_too_little_room_is_refused_with_what_the_smallest_take() -> None:
    units = _units(1, 4, 3)
    assert choose(units, _least(units)) == tuple(min(unit.sizes, key=unit.sizes.__getitem__) for unit in units)
    with pytest.raises(SchemeError, match="smallest choices"):
        choose(units, _least(units) - 1)


def test_a_cost_that_is_no_number_is_refused() -> None:
    units = [*_units(1, 2, 3), Unit(("odd",), 8, {"small": 1.0, "large": math.nan}, {"small": 1, "large": 2})]
    with pytest.raises(QuantizationError, match="what large costs odd"):
        choose(units, 10**6)


@pytest.mark.parametrize("step", [1, 64])
def test_two_thousand_units_of_eight_choices_take_seconds(step: int) -> None:
    units = _units(7, 2000, 8, step)
    begun = time.process_time()
    found = best(units, round(1.6 * _least(units)))
    assert time.process_time() - begun < 5
    assert found.bound == pytest.approx(found.cost, rel=1e-8)


def test_what_is_proven_is_told_where_states_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimize, "STATES", 1)
    units = _units(11, 12, 5)
    rooms = [round(_least(units) * share) for share in np.linspace(1.1, 1.9, 9)]
    found = [best(units, room) for room in rooms]
    monkeypatch.undo()
    exact = [best(units, room).cost for room in rooms]
    assert all(
        each.bound <= cost * (1 + 1e-9) <= each.cost * (1 + 2e-9) for each, cost in zip(found, exact, strict=True)
    )
    assert any(each.bound < each.cost * (1 - 1e-6) for each in found)
