"""How a walk that variants share is dealt to several workers: each part is a walk of its own, and gives the same bytes.

Parts pass the calibration set anew, so that more of them are more work. What needs no calibration goes apart from what
does, which costs nothing; what does is parted as far as the whole is expected to be done earlier by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

from quantkit.recipe import VariantSpec

BEGINNING = 2.0
"""Seconds in which a walk has begun: the model's frame is built, and its weights are found."""
PASSES = 4.0
"""What a pass of the calibration set takes beside solving for one variant, where no more is known."""
WORTH = 1.05
"""How much earlier the whole must be done for one part more."""


def unknown_seconds(variants: Sequence[VariantSpec]) -> float:
    """What a walk takes of a model of which nothing is known, in the time that one variant takes to be solved."""
    return len(variants) + (PASSES if any(variant.calibrated for variant in variants) else 0.0)


def parted(
    places: Sequence[int],
    variants: Sequence[VariantSpec],
    workers: int,
    seconds: Callable[[Sequence[VariantSpec]], float],
    beside: float = 0.0,
) -> list[list[int]]:
    """The parts of a walk, those that take longest first.

    Args:
        places: of the variants that share it.
        variants: of the run.
        workers: how many do the work of the run at a time.
        seconds: that a walk of some variants is expected to take.
        beside: seconds of other work that is done meanwhile, whenever a worker is free.

    Returns:
        The places of each part, in their order.
    """
    if workers < 2:
        return [list(places)]

    def takes(part: Sequence[int]) -> float:
        return BEGINNING + seconds([variants[place] for place in part])

    def end(parts: Sequence[Sequence[int]]) -> float:
        """When all is done at the earliest."""
        each = [takes(part) for part in parts]
        return max(*each, (sum(each) + beside) / workers)

    own = {place: seconds([variants[place]]) for place in places}
    kinds = [[place for place in places if variants[place].calibrated is told] for told in (True, False)]
    dealt = [[_dealt(kind, count + 1, own) for count in range(min(workers, len(kind)))] for kind in kinds if kind]
    ways = [[part for parts in way for part in parts] for way in product(*dealt)]
    soonest = min(ways, key=lambda way: end(way) * WORTH ** len(way))
    return sorted(soonest, key=takes, reverse=True)


def _dealt(places: Sequence[int], count: int, own: dict[int, float]) -> list[list[int]]:
    """So many parts of about the same seconds: the longest goes first, to the part that has least."""
    parts: list[list[int]] = [[] for _ in range(count)]
    for place in sorted(places, key=lambda each: own[each], reverse=True):
        min(parts, key=lambda part: sum(own[each] for each in part)).append(place)
    return [sorted(part) for part in parts]
