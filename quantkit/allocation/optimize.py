"""The choice for every unit that costs least within so many bytes: a knapsack of which each unit puts one thing in.

The lower convex hulls of the units, taken apart into steps and sorted by what a byte saves (a Lagrange sweep), bound
the cost of any room from below, and tell a first choice. From there on units are decided one by one, those first whose
choice is least sure, over all totals of bytes and cost that may still lead to something better (dynamic programming
over lists of states, with the bound of the units that are left for each). What is left is proven to be no better, so
the rest is as the sweep has it. This is the expanding core of Pisinger, "A minimal algorithm for the multiple-choice
knapsack problem", European Journal of Operational Research 83 (1995).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quantkit.allocation.table import Unit
from quantkit.errors import QuantizationError, SchemeError
from quantkit.system.units import in_units

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STATES = 1 << 15
"""The most totals that are looked at for a unit; those of least bound stay where there are more."""
CLOSE = 1e-9
"""The part of a cost by which another choice must be better to count as better."""


@dataclass(frozen=True, slots=True)
class Best:
    """A choice for every unit.

    Attributes:
        chosen: a name for each.
        cost: the sum of their costs.
        bound: what no choice of the same room costs less than. It is :attr:`cost` but for rounding, unless there were
            more than :data:`STATES` totals to look at.
    """

    chosen: tuple[str, ...]
    cost: float
    bound: float


def choose(units: Sequence[Unit], room: int) -> tuple[str, ...]:
    """A name for each unit, so that the sum of costs is least and that of sizes at most ``room``; see :func:`best`."""
    return best(units, room).chosen


def best(units: Sequence[Unit], room: int) -> Best:
    """The choice of least cost whose sizes come to at most ``room`` bytes, as good as exact.

    It is exact to a part in a billion, unless more than :data:`STATES` totals were open at once, of which the best were
    followed; :attr:`Best.bound` tells what was proven.

    Args:
        units: each with at least one choice, whose cost is a number.
        room: bytes.

    Raises:
        SchemeError: the smallest choices take more.
        QuantizationError: what a choice costs is no number.
    """
    options = [_Options.of(unit) for unit in units]
    least = sum(int(each.sizes[0]) for each in options)
    if least > room:
        raise SchemeError(
            f"the layers take {in_units(least)} in their smallest choices, and there is room for {in_units(room)}",
            "raise the budget, or add smaller choices",
        )
    search = _Search(options, room)
    picked = search.run()
    cost = sum(float(each.costs[index]) for each, index in zip(options, picked, strict=True))
    names = tuple(each.names[index] for each, index in zip(options, picked, strict=True))
    return Best(names, cost, min(cost, search.bound))


@dataclass(frozen=True, slots=True)
class _Options:
    """The choices of a unit of which none is both larger and no better than another, the smallest first.

    Attributes:
        names: of them.
        sizes: bytes, which rise.
        costs: which fall.
        hull: the indices of those on the lower convex hull.
    """

    names: tuple[str, ...]
    sizes: Ints
    costs: Floats
    hull: tuple[int, ...]

    @classmethod
    def of(cls, unit: Unit) -> _Options:
        """Those of a unit.

        Raises:
            QuantizationError: what one costs is no number.
        """
        odd = next((name for name, cost in unit.costs.items() if not math.isfinite(cost)), None)
        if odd is not None:
            problem = f"what {odd} costs {unit.layers[0]} is {unit.costs[odd]}, and no number"
            raise QuantizationError(problem, "leave out that choice, or calibrate on other rows")
        kept: list[str] = []
        for name in sorted(unit.costs, key=lambda name: (unit.sizes[name], unit.costs[name])):
            if not kept or unit.costs[name] < unit.costs[kept[-1]]:
                kept.append(name)
        sizes = np.array([unit.sizes[name] for name in kept], dtype=np.int64)
        costs = np.array([unit.costs[name] for name in kept], dtype=np.float64)
        return cls(tuple(kept), sizes, costs, _hull(sizes, costs))

    def slopes(self) -> list[float]:
        """What a byte saves on each step of the hull, as a negative number; they rise."""
        return [_slope(self.sizes, self.costs, *step) for step in zip(self.hull[:-1], self.hull[1:], strict=True)]


def _slope(sizes: Ints, costs: Floats, one: int, other: int) -> float:
    return float((costs[other] - costs[one]) / (sizes[other] - sizes[one]))


def _hull(sizes: Ints, costs: Floats) -> tuple[int, ...]:
    found: list[int] = []
    for index in range(len(sizes)):
        while len(found) > 1 and _slope(sizes, costs, found[-1], index) <= _slope(sizes, costs, *found[-2:]):
            found.pop()
        found.append(index)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps of the hulls of several units, the one that saves most for a byte first.

    Attributes:
        units: of each its unit, by its place in the order in which units are decided.
        sizes: bytes that each adds.
        costs: what each adds, which is negative.
    """

    units: Ints
    sizes: Ints
    costs: Floats

    @classmethod
    def of(cls, options: Sequence[_Options]) -> _Steps:
        """Those of all units; of steps that save alike those of earlier units come first."""
        rows = [
            (slope, place, int(each.sizes[last] - each.sizes[first]), float(each.costs[last] - each.costs[first]))
            for place, each in enumerate(options)
            for slope, first, last in zip(each.slopes(), each.hull[:-1], each.hull[1:], strict=True)
        ]
        rows.sort(key=lambda row: row[0])
        units = np.array([row[1] for row in rows], dtype=np.int64)
        sizes = np.array([row[2] for row in rows], dtype=np.int64)
        return cls(units, sizes, np.array([row[3] for row in rows], dtype=np.float64))

    def from_place(self, place: int) -> tuple[_Steps, Ints, Floats]:
        """Those of the units from a place on, and the bytes and costs of so many of them, from none to all."""
        there = self.units >= place
        kept = _Steps(self.units[there], self.sizes[there], self.costs[there])
        sums = np.concatenate([[0], np.cumsum(kept.sizes)]), np.concatenate([[0.0], np.cumsum(kept.costs)])
        return kept, *sums


@dataclass(frozen=True, slots=True)
class _States:
    """Totals of the units that are decided, none of them both larger and no better than another.

    Attributes:
        sizes: bytes, which rise.
        costs: which fall.
        parents: of each the state before its last unit was decided.
        picks: and what was chosen for that.
        before: those states.
    """

    sizes: Ints
    costs: Floats
    parents: Ints
    picks: Ints
    before: _States | None = None

    def with_unit(self, sizes: Ints, costs: Floats, picks: Ints) -> _States:
        """All totals with one of these choices of a further unit."""
        totals, prices = (self.sizes[:, None] + sizes).ravel(), (self.costs[:, None] + costs).ravel()
        order = np.lexsort((prices, totals))
        sorted_prices = prices[order]
        lowest = np.minimum.accumulate(sorted_prices)
        new = np.concatenate([[True], sorted_prices[1:] < lowest[:-1]])
        kept = order[new]
        return _States(totals[kept], prices[kept], kept // len(sizes), picks[kept % len(sizes)], self)

    def only(self, kept: Ints) -> _States:
        """Some of them."""
        return replace(
            self,
            sizes=self.sizes[kept],
            costs=self.costs[kept],
            parents=self.parents[kept],
            picks=self.picks[kept],
        )

    def trail(self, index: int) -> list[int]:
        """What was chosen for each unit on the way to a state."""
        found: list[int] = []
        at: _States = self
        while at.before is not None:
            found.append(int(at.picks[index]))
            index, at = int(at.parents[index]), at.before
        return found[::-1]


class _Search:
    """The search for the best choice of units.

    Args:
        options: of each unit.
        room: bytes that they may take, at least those of the smallest choices.
    """

    def __init__(self, options: Sequence[_Options], room: int) -> None:
        self._room = room
        price = _price(options, room)
        self._excess = [each.costs + price * each.sizes for each in options]
        self._excess = [each - each.min() for each in self._excess]
        doubts = [float(np.sort(each)[1]) if len(each) > 1 else np.inf for each in self._excess]
        self._order = sorted(range(len(options)), key=lambda unit: doubts[unit])
        self._doubts = doubts
        self._options = [options[unit] for unit in self._order]
        self._steps = _Steps.of(self._options)
        self._cost = np.inf
        self._picked: list[int] = []
        self._floor = sum(float((each.costs + price * each.sizes).min()) for each in options) - price * room
        self.bound = np.inf
        """What those totals cost at least that were let go for want of room."""

    def run(self) -> list[int]:
        """The index of the best choice of each unit."""
        none = np.zeros(1, dtype=np.int64)
        states = self._bounded(_States(none, np.zeros(1), none, none), 0)
        for place, unit in enumerate(self._order):
            gap = self._cost - self._floor
            if self._doubts[unit] > gap or not len(states.sizes):
                break
            picks = np.flatnonzero(self._excess[unit] <= gap)
            each = self._options[place]
            states = self._bounded(states.with_unit(each.sizes[picks], each.costs[picks], picks), place + 1)
        found = [0] * len(self._order)
        for unit, index in zip(self._order, self._picked, strict=True):
            found[unit] = index
        return found

    def _bounded(self, states: _States, place: int) -> _States:
        """The states from which something better may come; the best that is seen on the way is kept.

        Args:
            states: of the units before a place.
            place: in the order of units.
        """
        steps, sizes, costs = self._steps.from_place(place)
        rest = self._options[place:]
        least_size = sum(int(each.sizes[0]) for each in rest)
        least_cost = sum(float(each.costs[0]) for each in rest)
        free = self._room - least_size - states.sizes
        states, free = states.only(np.flatnonzero(free >= 0)), free[free >= 0]
        if not len(free):
            return states
        taken = np.searchsorted(sizes, free, side="right") - 1
        reached = states.costs + least_cost + costs[taken]
        self._note(states, int(reached.argmin()), float(reached.min()), steps.units[: taken[reached.argmin()]], place)
        bounds = states.costs + least_cost + np.interp(free, sizes, costs)
        kept = np.flatnonzero(bounds < self._cost - CLOSE * abs(self._cost))
        if len(kept) > STATES:
            kept = kept[np.argsort(bounds[kept], kind="stable")]
            self.bound = min(self.bound, float(bounds[kept[STATES]]))
            kept = np.sort(kept[:STATES])
        return states.only(kept)

    def _note(self, states: _States, index: int, cost: float, taken: Ints, place: int) -> None:
        """Keep a state with the steps that were taken from it, if nothing better is known."""
        if cost >= self._cost:
            return
        steps = np.bincount(taken, minlength=len(self._order))
        rest = [each.hull[steps[at]] for at, each in enumerate(self._options) if at >= place]
        self._cost, self._picked = cost, [*states.trail(index), *rest]


def _price(options: Sequence[_Options], room: int) -> float:
    """What a byte is worth at the room's edge: what the first step that does not fit saves for each."""
    _, sizes, costs = _Steps.of(options).from_place(0)
    free = room - sum(int(each.sizes[0]) for each in options)
    step = int(np.searchsorted(sizes, free, side="right"))
    if step == len(sizes):
        return 0.0
    return float((costs[step - 1] - costs[step]) / (sizes[step] - sizes[step - 1]))
