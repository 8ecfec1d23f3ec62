"""Bits by layer: of each mix a strip of what its layers got, kind by block, and how much got each choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.report.columns import Record
from quantkit.report.mixes import mixes_of
from quantkit.report.numbers import count, fixed, in_bytes, padded, parameters
from quantkit.schemes.mix import Mix, Spot
from quantkit.schemes.places import Stack

ROW_HEIGHT = 16
FILLED = 0.93
"""Part of a block's width that is coloured."""
MOST_WRITTEN, MANY = 48, 20
"""Blocks up to which their bits are written into them, and from which on a narrow page has no room for that."""


@dataclass(frozen=True, slots=True)
class Box:
    """A block's layers of one kind, as they are drawn.

    Attributes:
        x, width, middle: as shares of the picture's width, in per cent.
        level: which colour it has, 0 to 6.
        digit: its bits, where there is room to write them.
        tip: its name, choice and bits.
    """

    x: str
    width: str
    middle: str
    level: int
    digit: str
    tip: str


@dataclass(frozen=True, slots=True)
class BitsStrip:
    """A stack of blocks of a mix.

    Attributes:
        title: what the names of its layers begin with, where there are several stacks.
        first, last: its first and last block.
        rows: label and boxes of each kind of layer.
    """

    title: str
    first: int
    last: int
    rows: Sequence[tuple[str, Sequence[Box]]]

    @property
    def height(self) -> int:
        """Of the picture, in pixels."""
        return ROW_HEIGHT * len(self.rows)

    @property
    def is_many(self) -> bool:
        """Whether it has more blocks than a narrow page can write into."""
        return self.last - self.first >= MANY


@dataclass(frozen=True, slots=True)
class BitsMap:
    """A mix.

    Attributes:
        name: of the variant.
        caption: bits a weight, budget and predicted loss.
        strips: by stack.
        outside: colour, name and choice of what lies outside blocks.
        parts: of each choice the colour, and name, bits, layers, weights and bytes, in words.
        kinds: of each kind of layer the name, its choices, bits a weight, and its blocks, a character each.
    """

    name: str
    caption: str
    strips: Sequence[BitsStrip]
    outside: Sequence[tuple[int, str, str]]
    parts: Sequence[tuple[int, list[str]]]
    kinds: Sequence[tuple[str, str, str, str]]


def bits_maps(report: Record) -> list[BitsMap]:
    """The maps of all mixes."""
    return [_map(name, mix) for name, mix in mixes_of(report).items()]


def _map(name: str, mix: Mix) -> BitsMap:
    stacks = mix.stacks
    return BitsMap(
        name=name,
        caption=caption(mix),
        strips=[_strip(stack, stack.name if len(stacks) > 1 else "") for stack in stacks],
        outside=[(spot.level, spot.place.kind, spot.words) for spot in mix.outside],
        parts=[
            (
                part.level,
                [part.choice, fixed(part.bits, 2), count(part.layers), parameters(part.weights), in_bytes(part.nbytes)],
            )
            for part in mix.parts
        ],
        kinds=[(kind.label, kind.named, kind.range, kind.digits) for kind in mix.kinds()],
    )


def caption(mix: Mix) -> str:
    """What a mix takes, was to take, and is predicted to lose, in words."""
    told = [f"{fixed(mix.bits_per_weight, 3)} bits a weight in {count(mix.layers)} layers"]
    told += [f"budget {mix.budget}"] if mix.budget else []
    told += [] if mix.predicted is None else [f"predicted to lose {padded(mix.predicted)} nats per token"]
    return "; ".join(told)


def _strip(stack: Stack[Spot], title: str) -> BitsStrip:
    columns = stack.last - stack.first + 1
    rows = [
        (line.label, [_box(block - stack.first, columns, spot) for block, spot in line.spots]) for line in stack.lines
    ]
    return BitsStrip(title, stack.first, stack.last, rows)


def _box(column: int, columns: int, spot: Spot) -> Box:
    start, width = 100 * column / columns, 100 * FILLED / columns
    return Box(
        x=f"{start:.2f}%",
        width=f"{width:.2f}%",
        middle=f"{start + width / 2:.2f}%",
        level=spot.level,
        digit=spot.digit if columns <= MOST_WRITTEN else "",
        tip=f"{spot.place.name}: {spot.words}",
    )
