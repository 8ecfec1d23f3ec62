"""Which 16-bit dtype a model of wider floats is taken in, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
