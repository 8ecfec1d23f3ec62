"""Where layers are, by their names, laid out: kinds of layers from top to bottom, blocks from left to right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer is, by its name: ``stack.block.kind``, such as ``model.layers.3.mlp.down_proj``.

    Numbers behind the block, those of experts, are ``*``. A layer outside blocks has neither stack nor block.
    """

    stack: str
    block: int | None
    kind: str

    @property
    def name(self) -> str:
        """The layer's name, or that of all layers there."""
        return self.kind if self.block is None else ".".join(filter(None, (self.stack, str(self.block), self.kind)))


@dataclass(frozen=True, slots=True)
class Line(Generic[T]):
    """One kind of layer in all blocks of a stack.

    Attributes:
        label: the end of its name that tells it from the others.
        spots: what there is to tell of it, by block.
    """

    label: str
    spots: Sequence[tuple[int, T]]


@dataclass(frozen=True, slots=True)
class Stack(Generic[T]):
    """The blocks of one stack; most models have one.

    Attributes:
        name: what the names of its layers begin with.
        first, last: its first and last block.
        lines: one a kind.
    """

    name: str
    first: int
    last: int
    lines: Sequence[Line[T]]


@lru_cache(maxsize=1 << 16)  # all mixes of a report have the layers of one model
def place_of(name: str) -> Place:
    """Where a layer is; the first number in its name is that of its block."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if at is None or at == len(parts) - 1:
        return Place("", None, name)
    kind = ".".join("*" if part.isdecimal() else part for part in parts[at + 1 :])
    return Place(".".join(parts[:at]), int(parts[at]), kind)


def stacks_of(spots: Iterable[tuple[Place, T]]) -> list[Stack[T]]:
    """What is told of places, laid out; those outside blocks are left out."""
    stacks: dict[str, dict[str, list[tuple[int, T]]]] = {}
    for place, spot in spots:
        if place.block is not None:
            stacks.setdefault(place.stack, {}).setdefault(place.kind, []).append((place.block, spot))
    return [_stack(name, kinds) for name, kinds in stacks.items()]


def _stack(name: str, kinds: dict[str, list[tuple[int, T]]]) -> Stack[T]:
    blocks = [block for spots in kinds.values() for block, _ in spots]
    labels = _labels(list(kinds))
    lines = [Line(labels[kind], sorted(spots, key=lambda spot: spot[0])) for kind, spots in kinds.items()]
    return Stack(name, min(blocks), max(blocks), lines)


def _labels(kinds: list[str]) -> dict[str, str]:
    """Of each kind the shortest end of its name that no other has."""
    found = {}
    for kind in kinds:
        parts = kind.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [other for other in kinds if other != kind]
        found[kind] = next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), kind)
    return found
