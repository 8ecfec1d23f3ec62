"""Loss by layer: of each variant a strip of the errors that its layers have, layer by block.

A layer is coloured by its error beside the variant's median, so that a strip says where a variant loses most, whatever
it loses altogether. What overrides would mend is told below it, see :mod:`quantkit.report.mending`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantkit.report.columns import Record
from quantkit.report.mending import mending, standing_out
from quantkit.report.numbers import ABSENT, figure, padded
from quantkit.report.tuned_blocks import TunedBlocks, tuned_blocks
from quantkit.schemes.places import Place, place_of, stacks_of

STEPS = (0.25, 0.5, 0.71, 1.41, 2.0, 4.0)
"""Ratios to the median at which the colour changes."""
LEGEND = ("¼ or less", "to ½", "to 0.7", "the median", "to 2", "to 4 times", "more")
UNIT = 10.0
ROW_HEIGHT = 16
GIVEN = "of outputs, on the calibration inputs"
UNGIVEN = "of weights, inputs taken as alike"


@dataclass(frozen=True, slots=True)
class Spot:
    """The layers of one kind in one block: the largest error of them.

    Attributes:
        place: where.
        name: of the layer with that error.
        error: relative.
        count: how many layers there are.
        ratio: of the error to the variant's median.
    """

    place: Place
    name: str
    error: float
    count: int
    ratio: float

    @property
    def level(self) -> int:
        """Which colour it has, 0 to 6; 3 is that of the median."""
        return sum(self.ratio > step for step in STEPS)

    @property
    def tip(self) -> str:
        """Its name and figures."""
        many = f", the worst of {self.count}" if self.count > 1 else ""
        return f"{self.name}{many}: {padded(self.error)}, {self.ratio:.2g} times the median"


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of layer in all blocks of a stack.

    Attributes:
        label: the end of its name that tells it from the others.
        spots: with the column of each.
        median, largest, block: in words, for the table.
    """

    label: str
    spots: list[tuple[int, Spot]]
    median: str
    largest: str
    block: str


@dataclass(frozen=True, slots=True)
class Strip:
    """A stack of blocks of a variant, rows by columns."""

    title: str
    first: int
    last: int
    rows: list[Row]

    @property
    def columns(self) -> int:
        """Blocks."""
        return self.last - self.first + 1

    @property
    def height(self) -> int:
        """Of the picture, in pixels."""
        return ROW_HEIGHT * len(self.rows)


@dataclass(frozen=True, slots=True)
class LayerMap:
    """A variant's strips.

    Attributes:
        name: of the variant.
        caption: median and largest error, and what they are of.
        strips: by stack; most models have one.
        outside: layers outside blocks, with their errors.
        worst: which layers stand out, in words.
        mending: keys of the variant that would mend them, as YAML; empty where it takes none.
        tuned: what tuning did to its blocks; None where it was not tuned.
    """

    name: str
    caption: str
    strips: list[Strip]
    outside: list[tuple[str, str]]
    worst: list[str]
    mending: str
    tuned: TunedBlocks | None


def layer_maps(report: Record) -> list[LayerMap]:
    """The maps of all finished variants with layers in blocks whose errors are known."""
    given = (report.get("recipe") or {}).get("variants") or []
    by_name = {str(entry.get("name")): entry for entry in given if isinstance(entry, Mapping)}
    done = [variant for variant in report["variants"] if variant.get("status") == "ok"]
    maps = (_map(variant, by_name.get(str(variant["name"]))) for variant in done)
    return [found for found in maps if found is not None and found.strips]


def _map(variant: Record, entry: Mapping[str, object] | None) -> LayerMap | None:
    layers = [layer for layer in variant.get("layers") or [] if isinstance(layer, Mapping)]
    known = [(str(layer.get("name")), error) for layer in layers if (error := figure(layer, "error_after")) is not None]
    spots = _spots(known)
    if not spots:
        return None
    middle = statistics.median(spot.error for spot in spots)
    worst = max(spots, key=lambda spot: spot.error)
    kinds = {GIVEN if figure(layer, "tokens") else UNGIVEN for layer in layers}
    caption = f"Median {padded(middle)}, largest {padded(worst.error)} in {worst.name}; relative squared error "
    groups = standing_out(spots, str(variant.get("format") or ""))
    return LayerMap(
        name=str(variant["name"]),
        caption=caption + " and ".join(sorted(kinds)),
        strips=_strips(spots),
        outside=[(spot.name, padded(spot.error)) for spot in spots if spot.place.block is None],
        worst=[group.why for group in groups],
        mending=mending(groups, entry),
        tuned=tuned_blocks(variant),
    )


def _spots(known: Iterable[tuple[str, float]]) -> list[Spot]:
    """The largest error of each place, in the order of the model."""
    gathered: dict[Place, list[tuple[float, str]]] = {}
    for name, error in known:
        gathered.setdefault(place_of(name), []).append((error, name))
    if not gathered:
        return []
    worst = {place: max(found) for place, found in gathered.items()}
    middle = statistics.median(error for error, _ in worst.values())
    return [
        Spot(place, name, error, len(gathered[place]), error / middle if middle else float(error > 0) * 100)
        for place, (error, name) in worst.items()
    ]


def _strips(spots: list[Spot]) -> list[Strip]:
    stacks = stacks_of((spot.place, spot) for spot in spots)
    return [
        Strip(
            stack.name if len(stacks) > 1 else "",
            stack.first,
            stack.last,
            [_row(line.label, [spot for _, spot in line.spots], stack.first) for line in stack.lines],
        )
        for stack in stacks
    ]


def _row(label: str, spots: list[Spot], first: int) -> Row:
    worst = max(spots, key=lambda spot: spot.error)
    return Row(
        label,
        [((spot.place.block or 0) - first, spot) for spot in spots],
        padded(statistics.median(spot.error for spot in spots)),
        padded(worst.error),
        ABSENT if worst.place.block is None else str(worst.place.block),
    )
