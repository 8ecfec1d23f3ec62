"""Tokens by expert: how many calibration tokens the router sent to each expert of each layer, and which are few."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.engine.routing import ExpertSettings

FEW = 4
"""An expert that saw fewer tokens than this times the width of its input is told of: with so many, chance alone moves
the mean products of inputs by half of their size."""


@dataclass(frozen=True, slots=True)
class ExpertTokens:
    """The experts of a layer.

    Attributes:
        name: what the names of their layers begin with.
        tokens: calibration tokens of each, by its number.
        wanted: of how many it should have seen.
    """

    name: str
    tokens: Sequence[int]
    wanted: int

    @property
    def few(self) -> int:
        """How many saw fewer."""
        return sum(tokens < self.wanted for tokens in self.tokens)

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {**asdict(self), "tokens": list(self.tokens), "few": self.few}


def expert_tokens(found: Mapping[str, Mapping[str, int]], shapes: Mapping[str, tuple[int, int]]) -> list[ExpertTokens]:
    """The experts of each layer.

    Args:
        found: by what the names of a layer's experts begin with, the tokens of each of their layers; of an expert those
            that are solved first read what it is given.
        shapes: of the layers.
    """
    tables = []
    for name, layers in found.items():
        first = next(iter(layers))
        leaf = _leaf(name, first)
        own = {_number(name, layer): tokens for layer, tokens in layers.items() if _leaf(name, layer) == leaf}
        tables.append(ExpertTokens(name, [own[number] for number in sorted(own)], FEW * shapes[first][1]))
    return tables


def expert_line(table: Mapping[str, Any]) -> str:
    """A layer's experts, as they are in the report, in one line."""
    tokens = table["tokens"]
    few = f"; {table['few']:,} below {table['wanted']:,}" if table["few"] else ""
    middle = statistics.median(tokens)
    return (
        f"{table['name']}: {len(tokens):,} experts, calibration tokens {min(tokens):,} to {max(tokens):,}, "
        f"median {middle:,.0f}{few}"
    )


def _number(name: str, layer: str) -> int:
    return int(layer.removeprefix(f"{name}.").partition(".")[0])


def _leaf(name: str, layer: str) -> str:
    return layer.removeprefix(f"{name}.").partition(".")[2]


def expert_notes(tables: Sequence[ExpertTokens], settings: ExpertSettings) -> list[str]:
    """What is to be said of experts that saw few tokens, in one line."""
    few = sum(table.few for table in tables)
    if not few or settings.tokens == "all":
        return []
    every = [tokens for table in tables for tokens in table.tokens]
    none = sum(not tokens for tokens in every)
    wanted = " or ".join(f"{each:,}" for each in sorted({table.wanted for table in tables}))
    beside = "those of their whole layer count beside their own statistics; " if settings.prior else ""
    return [
        f"{few:,} of {len(every):,} experts saw fewer than {wanted} calibration tokens, {FEW} times the width of their "
        f"input, {none:,} of them none; {beside}give more samples, or set calibration.experts: all"
    ]
