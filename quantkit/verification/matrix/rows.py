"""The rows of the matrix: every kind of grid in every format that stores it, as the format lists them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats import FORMATS
from quantkit.methods import METHODS
from quantkit.recipe import VariantSpec
from quantkit.system.validation import parse_section

COMPOSED = ("awq+gptq", "awq+hqq")
"""Methods in one that are tried beside the single ones."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way of storing a model.

    Attributes:
        format: name of the format.
        keys: the scheme, as a variant gives it.
    """

    format: str
    keys: dict[str, Any] = field(hash=False)

    def variant(self, method: str) -> VariantSpec | None:
        """The variant by a method; None where the two do not go together."""
        given = {"name": f"{self.format}-{self.slug()}-{method.replace('+', '-')}", "method": method}
        try:
            return parse_section(VariantSpec, {**given, "format": self.format, **self.keys}, "matrix")
        except QuantkitError:
            return None

    def name(self) -> str:
        """The scheme's short name, with what is mixed into it."""
        variant = next(filter(None, map(self.variant, method_names())))
        return " + ".join(scheme.describe() for scheme in variant.schemes())

    def slug(self) -> str:
        """A name for files."""
        parts = ["mixed" if key == "overrides" else f"{key}-{value}" for key, value in self.keys.items()]
        return "-".join(parts).replace("_", "-")


def method_names() -> list[str]:
    """The methods that are tried, single ones first."""
    return [*METHODS.names(), *COMPOSED]


def rows() -> Iterator[Row]:
    """All rows: the examples of every format that quantkit writes."""
    for store in FORMATS:
        yield from (Row(store.name, dict(keys)) for keys in store.examples)
