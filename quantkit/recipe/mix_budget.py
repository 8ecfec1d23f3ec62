"""Budgets of mixed variants: what a file may take, by one of three measures."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from quantkit.errors import RecipeError
from quantkit.recipe.fields import Section, Whole
from quantkit.recipe.outputs import Bytes
from quantkit.system.units import in_units
from quantkit.system.validation import located, parse_section

CONTEXT = 4096
"""Tokens of the sequence for which memory is counted, unless a budget says otherwise."""
BITS = 16.0
"""Of a weight, at most."""
BUDGETS = "write budget: 4.0 (bits per weight), budget: 5GiB (of the file), or budget: {memory: 8GiB, context: 8192}"


class MixBudget(Section):
    """What a mixed variant may take, by one of three measures.

    Attributes:
        bits_per_weight: of the layers that take part, scales included.
        size: bytes of the file, or a text such as ``5GiB``.
        memory: bytes that a server needs for weights, the KV cache of one sequence, activations and what the device's
            runtime takes, or a text such as ``8GiB``.
        context: tokens of that sequence; what the model was made for at most.
    """

    bits_per_weight: Annotated[float, Field(gt=0, le=BITS, strict=True)] | None = None
    size: Bytes | None = None
    memory: Bytes | None = None
    context: Annotated[Whole, Field(ge=1)] = CONTEXT

    @model_validator(mode="before")
    @classmethod
    def _may_be_one_value(cls, given: Any) -> Any:
        if isinstance(given, bool) or not isinstance(given, int | float | str):
            return given
        try:
            number = float(given)
        except ValueError:
            return {"size": given}
        if number > BITS:
            problem = f"{given} is more bits than a weight has"
            with located():
                raise RecipeError(problem, "a size has its unit: 5GiB or 450MB")
        return {"bits_per_weight": number}

    @model_validator(mode="after")
    def _is_one_measure(self) -> MixBudget:
        measures = [key for key in ("bits_per_weight", "size", "memory") if getattr(self, key) is not None]
        with located():
            if len(measures) != 1:
                told = f"gives {' and '.join(measures)}" if measures else "gives nothing that can be kept to"
                raise RecipeError(told, BUDGETS)
            if self.memory is None and self.context != CONTEXT:
                raise RecipeError(f"context has no meaning beside {measures[0]}", "leave it out, or give memory")
        return self

    @property
    def label(self) -> str:
        """A word for names: ``4.5``, ``5GiB``, ``8GiB-at-8192``."""
        if self.bits_per_weight is not None:
            return f"{self.bits_per_weight:g}"
        size = _short(self.size or self.memory or 0)
        return size if self.memory is None else f"{size}-at-{self.context}"

    def describe(self) -> str:
        """In words: ``4.5 bits per weight``, ``5.00 GiB``, ``8.00 GiB of memory at 8192 tokens``."""
        if self.bits_per_weight is not None:
            return f"{self.bits_per_weight:g} bits per weight"
        if self.memory is not None:
            return f"{in_units(self.memory)} of memory at {self.context} tokens"
        return in_units(self.size or 0)


def budget_of(given: Any, place: str) -> MixBudget:
    """A budget as a recipe writes it.

    Args:
        given: a number, a text or a mapping.
        place: of it in the recipe, for messages.

    Raises:
        RecipeError: it is none.
    """
    return parse_section(_Budget, {"budget": given}, place).budget


class _Budget(Section):
    budget: MixBudget


def _short(nbytes: int) -> str:
    """A size as people write it, such as ``5GiB`` or ``450MB``: the shortest text that is exact, else rounded."""
    units = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "KiB": 2**10, "kB": 10**3}
    exact = [f"{nbytes / size:g}{unit}" for unit, size in units.items() if nbytes >= size]
    return min(exact, key=lambda text: (len(text), exact.index(text)), default=f"{nbytes}B")
