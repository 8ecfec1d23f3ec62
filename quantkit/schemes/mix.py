"""A mix: which of several schemes each layer got, as an allocation tells it on disk and in a report.

Only what was chosen is read here, from its JSON; what else could have been is in :mod:`quantkit.allocation`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantkit.schemes.places import Place, Stack, place_of, stacks_of
from quantkit.system.units import finite

MIX_FILE = "allocation.json"
"""The file of an allocation in the folder of a checkpoint."""
STEPS = (2.75, 3.75, 4.75, 5.75, 7.0, 12.0)
"""Bits a weight, with the shares of scales and zero points, at which the colour and the digit of a layer change."""
DIGITS = ("2", "3", "4", "5", "6", "8", "f")
"""A layer's bits in one character; ``f`` is float."""
LEGEND = ("2 bits or fewer", "3", "4", "5", "6", "8", "float")
NOTHING = "\N{MIDDLE DOT}"
"""Stands where a block has no layer of a kind."""
MOST_NAMED = 4
"""Choices that are named one by one; of more the extremes are."""


@dataclass(frozen=True, slots=True)
class Spot:
    """The layers of one kind in one block, such as one projection of all experts.

    Attributes:
        place: where.
        choices: how many layers got which choice.
        bits: a weight, the mean of the layers.
    """

    place: Place
    choices: Mapping[str, int]
    bits: float

    @property
    def level(self) -> int:
        """Which colour it has, 0 to 6."""
        return sum(self.bits > step for step in STEPS)

    @property
    def digit(self) -> str:
        """Its bits in one character."""
        return DIGITS[self.level]

    @property
    def words(self) -> str:
        """What it got."""
        many = len(self.choices) > 1
        named = ", ".join(f"{name} in {count}" if many else name for name, count in self.choices.items())
        return f"{named}: {self.bits:.2f} bits a weight"


@dataclass(frozen=True, slots=True)
class Part:
    """What got one choice.

    Attributes:
        choice: its name.
        bits: that it takes a weight.
        layers, weights, nbytes: of it.
    """

    choice: str
    bits: float
    layers: int
    weights: int
    nbytes: int

    @property
    def level(self) -> int:
        """Which colour it has, 0 to 6."""
        return sum(self.bits > step for step in STEPS)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of layer in all blocks.

    Attributes:
        label: the end of its name that tells it from the others, behind its stack's where there are several.
        choices: in how many blocks it got which choice, the fewest bits first.
        least, most: bits a weight of its blocks.
        digits: its blocks from first to last, a character each; empty of a layer outside blocks.
    """

    label: str
    choices: Mapping[str, int]
    least: float
    most: float
    digits: str

    @property
    def named(self) -> str:
        """The choices in words."""
        many = len(self.choices) > 1
        return ", ".join(f"{name} in {count}" if many else name for name, count in self.choices.items())

    @property
    def range(self) -> str:
        """Its bits a weight in words."""
        least, most = f"{self.least:.2f}", f"{self.most:.2f}"
        return least if least == most else f"{least} to {most}"


@dataclass(frozen=True, slots=True)
class Tied:
    """Layers that got one choice together: their names, the choice, how many weights and bytes they have."""

    layers: Sequence[str]
    choice: str
    weights: int
    nbytes: int

    @property
    def bits(self) -> float:
        """That they take a weight."""
        return 8 * self.nbytes / self.weights


@dataclass(frozen=True)
class Mix:
    """What the layers got.

    Attributes:
        units: layers that got one choice together.
        predicted: by how much it is predicted to raise the divergence, nats a token; None where nobody told.
        facts: what else the allocation says, such as its budget.
    """

    units: Sequence[Tied]
    predicted: float | None
    facts: Mapping[str, Any]

    @cached_property
    def parts(self) -> list[Part]:
        """What there is of each choice, the fewest bits first."""
        by_choice: dict[str, list[Tied]] = {}
        for unit in self.units:
            by_choice.setdefault(unit.choice, []).append(unit)
        found = []
        for choice, own in by_choice.items():
            nbytes, weights = sum(unit.nbytes for unit in own), sum(unit.weights for unit in own)
            found.append(Part(choice, 8 * nbytes / weights, sum(len(unit.layers) for unit in own), weights, nbytes))
        return sorted(found, key=lambda part: (part.bits, part.choice))

    @cached_property
    def spots(self) -> list[Spot]:
        """What lies at each place, in the order of the units."""
        gathered: dict[Place, list[Tied]] = {}
        for unit in self.units:
            for name in unit.layers:
                gathered.setdefault(place_of(str(name)), []).append(unit)
        return [
            Spot(place, Counter(unit.choice for unit in found), sum(unit.bits for unit in found) / len(found))
            for place, found in gathered.items()
        ]

    @property
    def choices(self) -> tuple[str, ...]:
        """The choice of each unit."""
        return tuple(unit.choice for unit in self.units)

    @property
    def layers(self) -> int:
        """How many there are."""
        return sum(part.layers for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Of all layers."""
        return sum(part.nbytes for part in self.parts)

    @property
    def weights(self) -> int:
        """Of all layers."""
        return sum(part.weights for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """Of all layers."""
        return 8 * self.nbytes / self.weights

    @property
    def budget(self) -> str:
        """What it was made for, in words; empty where nobody told."""
        return str(self.facts.get("budget") or "")

    @property
    def name(self) -> str:
        """The schemes in short, such as ``mixed int3, int4``."""
        names = [part.choice for part in self.parts]
        if len(names) > MOST_NAMED:
            return f"mixed {names[0]} to {names[-1]}, {len(names)} kinds"
        return f"mixed {', '.join(names)}" if len(names) > 1 else names[0]

    @property
    def words(self) -> str:
        """How many layers got what."""
        return ", ".join(f"{part.choice} in {part.layers} layers" for part in self.parts)

    @property
    def stacks(self) -> list[Stack[Spot]]:
        """Laid out by kind and block."""
        return stacks_of((spot.place, spot) for spot in self.spots)

    @property
    def outside(self) -> list[Spot]:
        """What lies outside blocks: the embedding, the head."""
        return [spot for spot in self.spots if spot.place.block is None]

    def kinds(self) -> list[Kind]:
        """By kind of layer, those outside blocks last."""
        stacks, bits = self.stacks, {part.choice: part.bits for part in self.parts}
        found = []
        for stack in stacks:
            for line in stack.lines:
                label = f"{stack.name} {line.label}" if len(stacks) > 1 else line.label
                digits = {block: spot.digit for block, spot in line.spots}
                written = "".join(digits.get(block, NOTHING) for block in range(stack.first, stack.last + 1))
                found.append(_kind(label, [spot for _, spot in line.spots], written, bits))
        return found + [_kind(spot.place.kind, [spot], "", bits) for spot in self.outside]


def mix_of(data: Any) -> Mix | None:
    """What an allocation's JSON says was chosen; None where there is none, or it is not of this form."""
    try:
        units = [_tied(each) for each in data["units"]]
        told = {key: value for key, value in data.items() if key not in ("version", "units", "choices", "predicted")}
        predicted = finite((data.get("predicted") or {}).get("kl_divergence"))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None  # a report or a file may come from elsewhere
    return Mix(units, predicted, told) if units else None


def _tied(data: Mapping[str, Any]) -> Tied:
    layers, choice, weights = data["layers"], str(data["choice"]), int(data["weights"])
    if not isinstance(layers, list) or not layers or weights < 1:
        raise ValueError("a unit has layers, and weights")
    return Tied(layers, choice, weights, int(data["bytes"][choice]))


def _kind(label: str, spots: Sequence[Spot], digits: str, bits: Mapping[str, float]) -> Kind:
    counted = Counter(name for spot in spots for name in spot.choices)
    ordered = dict(sorted(counted.items(), key=lambda pair: (bits[pair[0]], pair[0])))
    return Kind(label, ordered, min(spot.bits for spot in spots), max(spot.bits for spot in spots), digits)
