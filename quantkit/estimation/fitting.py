"""The reverse question: what fits into so much memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantkit.errors import RecipeError, SchemeError
from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.cards import CARDS, GGUF_FAMILIES, WAYS, Card, Way
from quantkit.estimation.estimate import split
from quantkit.estimation.inference import running
from quantkit.estimation.models import anatomy_of
from quantkit.estimation.training import training
from quantkit.estimation.use import Use
from quantkit.estimation.weights import Stored, stored
from quantkit.recipe import VariantSpec
from quantkit.system.units import parse_bytes
from quantkit.system.validation import parse_section

STEP = 256
"""Contexts are tried in steps of so many tokens."""
LONGEST = 131072
"""The longest context that is tried for a model that does not say for how many tokens it was made."""


@dataclass(frozen=True)
class Fit:
    """A way of quantizing a model for a card.

    Attributes:
        anatomy: the model.
        way: method, format and scheme.
        variant: the same, as a variant.
        stored: its file.
        use: how the model is used.
        memory: bytes that there are.
    """

    anatomy: Anatomy
    way: Way
    variant: VariantSpec
    stored: Stored
    use: Use
    memory: int

    @cached_property
    def nbytes(self) -> int:
        """What it takes at the context that was asked for."""
        return self._at(self.use.context)

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.nbytes <= self.memory

    @cached_property
    def longest_context(self) -> int:
        """The longest context that fits, in steps of 256 tokens, up to what the model was made for; 0 for none."""
        low, high = 0, (self.anatomy.context or LONGEST) // STEP
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._at(middle * STEP) <= self.memory else (low, middle - 1)
        return low * STEP

    @cached_property
    def training_bytes(self) -> int:
        """What QLoRA training on it takes."""
        return training(self.anatomy, self.stored, self.use).nbytes

    def to_json(self) -> dict[str, Any]:
        """Method, format, scheme, bits per weight, bytes, whether it fits, and the longest context that does."""
        return {
            "method": self.way.method,
            "format": self.way.format,
            "scheme": self.variant.base_scheme().describe(),
            "bits_per_weight": self.stored.bits_per_weight or 16.0,
            "file_bytes": self.stored.nbytes,
            "bytes": self.nbytes,
            "fits": self.fits,
            "longest_context": self.longest_context,
        }

    def _at(self, context: int) -> int:
        return running(self.anatomy, self.stored, self.use.model_copy(update={"context": context})).nbytes


@dataclass(frozen=True, slots=True)
class CardFit:
    """What fits on a card.

    Attributes:
        card: the card.
        best: the way of the best expected quality that fits; None where none does.
        trains: whether QLoRA training on NF4 fits with the same batch and context.
    """

    card: Card
    best: Fit | None
    trains: bool

    def to_json(self) -> dict[str, Any]:
        """Card, bytes, the best fit, and whether training fits."""
        best = self.best and self.best.to_json()
        return {"card": self.card.name, "bytes": self.card.nbytes, "best": best, "trains": self.trains}


def fits(model: str, memory: str | int, **options: Any) -> list[Fit]:
    """Ways of quantizing a model for so much memory, by expected quality, the best first; also those that do not fit.

    Args:
        model: see :func:`quantkit.estimation.estimate`.
        memory: such as ``8GiB``, or a number of bytes.
        options: keys of :class:`quantkit.estimation.Use`.

    Raises:
        QuantkitError: there is no such model, or the memory is no size.
    """
    anatomy, use = anatomy_of(model), _use(options)
    return list(_ways(anatomy, use, parse_bytes(memory)))


def cards(model: str, **options: Any) -> list[CardFit]:
    """What fits on the usual cards, see :func:`fits`."""
    anatomy, use = anatomy_of(model), _use(options)
    found = list(_ways(anatomy, use, 0))
    base = next((each for each in found if each.way.keys.get("scheme") == "nf4"), None)
    rows = []
    for card in CARDS:
        there = (Fit(e.anatomy, e.way, e.variant, e.stored, e.use, card.nbytes) for e in found)
        best = next((each for each in there if each.fits), None)
        rows.append(CardFit(card, best, base is not None and base.training_bytes <= card.nbytes))
    return rows


def _use(options: dict[str, Any]) -> Use:
    use, rest = split(options)
    if rest:
        raise RecipeError(
            f"'{next(iter(rest))}' has no meaning here: what fits is what is asked",
            f"keys: {', '.join(Use.model_fields)}",
        )
    return use


def _ways(anatomy: Anatomy, use: Use, memory: int) -> Iterator[Fit]:
    """Every way that the model's shapes allow."""
    for way in WAYS:
        if way.format == "gguf" and anatomy.family not in GGUF_FAMILIES:
            continue
        keys = {"name": "way", "method": way.method, "format": way.format, **way.keys}
        variant = parse_section(VariantSpec, keys, "fits")
        try:
            file = stored(anatomy, variant)
        except SchemeError:
            continue  # its groups do not divide this model's rows
        yield Fit(anatomy, way, variant, file, use, memory)
