"""Which 16-bit dtype a model of wider floats is taken in, and why; which values another dtype makes zeros."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

WIDE = ("float32", "float64")
"""Dtypes of checkpoints that nobody serves."""
EXACT = "which holds every value of it exactly"
ROUNDED = "whose range is that of float32, with 8 significant bits of each value (float16 has 11, and ends at 65504)"


@dataclass(frozen=True, slots=True)
class Halved:
    """The choice.

    Attributes:
        dtype: ``bfloat16`` or ``float16``.
        why: it is this one, as the end of a sentence.
    """

    dtype: str
    why: str

    def note(self, reference: str, was: str) -> str:
        """What the user is told.

        Args:
            reference: what the model is called.
            was: its dtype.
        """
        return f"{reference} is {was} and is taken in {self.dtype}, {self.why}; model.dtype: own keeps {was}"


def halved(tensors: Iterable[torch.Tensor]) -> Halved:
    """The 16-bit dtype of a model with these tensors: the one in which it was before it was stored wider.

    A model that was trained in float32 becomes bfloat16, as float16 does not reach as far. Tensors are read until one
    of them is in neither dtype.
    """
    left = ["bfloat16", "float16"]
    for tensor in tensors:
        if tensor.is_floating_point():
            left = [name for name in left if torch.equal(tensor.to(getattr(torch, name)).to(tensor.dtype), tensor)]
        if not left:
            return Halved("bfloat16", ROUNDED)
    return Halved(left[0], EXACT)


MUCH = 1e-3
"""Share of the values of a tensor that is told where it became zeros."""


@dataclass
class Flushed:
    """Values too small for a dtype, which became zeros: those below half of its smallest number, 3e-8 of float16.

    Attributes:
        dtype: that the model is taken in.
        counts: of each tensor the values that became zeros, and those that were none.
    """

    dtype: str
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def count(self, name: str, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add a tensor, or a part of it, before and after it was cast."""
        if not before.is_floating_point() or before.dtype == after.dtype:
            return
        lost, some = self.counts.get(name, (0, 0))
        there = int(before.count_nonzero())
        self.counts[name] = (lost + there - int(after.count_nonzero()), some + there)

    def note(self) -> str | None:
        """What the user is told; None where no tensor lost much."""
        shares = {name: lost / some for name, (lost, some) in self.counts.items() if some and lost / some > MUCH}
        if not shares:
            return None
        worst = max(shares, key=lambda name: shares[name])
        lost = sum(self.counts[name][0] for name in shares)
        return (
            f"{lost:,} values of {len(shares)} tensor{'s' * (len(shares) > 1)} are too small for {self.dtype} "
            f"and became 0, {shares[worst]:.2g} of those of {worst}; model.dtype: bfloat16 keeps them"
        )
