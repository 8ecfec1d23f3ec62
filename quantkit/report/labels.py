"""Where the names in a plot stand: beside their points, and off each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

HEIGHT, PADDING = 15.0, 5.0
_SWEEPS = 8
_NARROW, _WIDE = set("ijltfr.,:;|!'()[]- "), set("mwMW@%")


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Area shared with ``other``."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return width * height if width > 0 and height > 0 else 0.0

    def holds(self, other: Box) -> bool:
        """Whether ``other`` lies inside."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and other.right <= self.right
            and other.bottom <= self.bottom
        )


@dataclass(frozen=True, slots=True)
class Spot:
    """A place for a name.

    Attributes:
        box: what the name covers.
        cost: how much worse than the nearest place it is, by its distance.
        leader: the end of the line that ties it to its point, where it stands off.
    """

    box: Box
    cost: float
    leader: tuple[float, float] | None


def text_width(text: str, size: float = 12.0) -> float:
    """About how wide ``text`` is in a proportional sans-serif font of ``size`` pixels."""
    units = sum(
        0.37 if char in _NARROW else 0.95 if char in _WIDE else 0.72 if char.isupper() else 0.62 for char in text
    )
    return units * size


def place_labels(
    points: Sequence[tuple[float, float]], names: Sequence[str], obstacles: Sequence[Box], area: Box
) -> list[Spot]:
    """A place for every name, by moving one at a time to where it is least in the way.

    Args:
        points: the marks, in pixels.
        names: one for each point.
        obstacles: marks and error bars, which names should not cover.
        area: where names may stand.
    """
    spots = [_candidates(point, name, area) for point, name in zip(points, names, strict=True)]
    fixed = [
        [_blocked(spot, obstacles) + _astray(spot, point, points) for spot in candidates]
        for point, candidates in zip(points, spots, strict=True)
    ]
    chosen = [
        candidates[min(range(len(candidates)), key=lambda i: costs[i])]
        for candidates, costs in zip(spots, fixed, strict=True)
    ]
    for _ in range(_SWEEPS):
        before = list(chosen)
        for index, candidates in enumerate(spots):
            others = [spot for other, spot in enumerate(chosen) if other != index]
            costs = [
                cost + _conflict(spot, points[index], others)
                for spot, cost in zip(candidates, fixed[index], strict=True)
            ]
            chosen[index] = candidates[costs.index(min(costs))]
        if chosen == before:
            break
    return chosen


def _candidates(point: tuple[float, float], name: str, area: Box) -> list[Spot]:
    x, y = point
    width = text_width(name) + PADDING
    found = []
    for distance in (9.0, 18.0, 28.0, 40.0, 54.0, 70.0, 88.0, 108.0):
        for step in range(16):
            angle = math.tau * step / 16
            across, down = math.cos(angle), math.sin(angle)
            near_x, near_y = x + distance * across, y + distance * down
            left = near_x - width * (1 - across) / 2
            top = near_y - HEIGHT * (1 - down) / 2
            box = Box(left, top, left + width, top + HEIGHT)
            turned = 2.0 * (abs(down) > 0.01) + 2.0 * (across < -0.01)
            leader = None if distance < 12 else (near_x, near_y)
            if area.holds(box):
                found.append(Spot(box, distance + turned, leader))
    return found or [Spot(Box(x, y - HEIGHT, x + width, y), 0.0, None)]


def _blocked(spot: Spot, obstacles: Sequence[Box]) -> float:
    return spot.cost + sum(120.0 for box in obstacles if spot.box.overlap(box) > 0.5)


def _astray(spot: Spot, own: tuple[float, float], points: Sequence[tuple[float, float]]) -> float:
    """What a name costs for standing as near to another's mark as to its own, or its line for passing one."""
    cost = 0.0
    for point in points:
        if point != own:
            cost += 30.0 if _distance(spot.box, point) < min(_distance(spot.box, own), 14.0) + 3.0 else 0.0
            cost += sum(50.0 for x, y in _along(spot, own) if math.hypot(x - point[0], y - point[1]) < 7.0)
    return cost


def _distance(box: Box, point: tuple[float, float]) -> float:
    x, y = point
    return math.hypot(max(box.left - x, 0.0, x - box.right), max(box.top - y, 0.0, y - box.bottom))


def _along(spot: Spot, point: tuple[float, float]) -> list[tuple[float, float]]:
    """Points on the line from a mark to a name that stands off."""
    if spot.leader is None:
        return []
    across, down = spot.leader[0] - point[0], spot.leader[1] - point[1]
    return [(point[0] + across * k / 6, point[1] + down * k / 6) for k in range(1, 7)]


def _conflict(spot: Spot, point: tuple[float, float], others: Sequence[Spot]) -> float:
    cost = 0.0
    for other in others:
        shared = spot.box.overlap(other.box)
        cost += 200.0 + shared if shared > 0 else 0.0
    steps = [Box(x - 1, y - 1, x + 1, y + 1) for x, y in _along(spot, point)]
    return cost + sum(60.0 for other in others for step in steps if step.overlap(other.box) > 0)
