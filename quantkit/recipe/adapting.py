"""Options of an adapter that is put on a quantized model: a low-rank term for each layer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from quantkit.recipe.fields import Flag, Patterns, Section

SERVED = (8, 16, 32, 64, 128, 256)
"""The ranks that vLLM can be told to serve (``--max-lora-rank``); it serves a smaller one at the next of them."""

Start = Literal["weighted", "plain"]


class AdapterOptions(Section):
    """How an adapter is made.

    Attributes:
        rank: of the term of each layer.
        alpha: PEFT multiplies the terms with ``alpha / rank``; by default with 1. What they add is the same.
        layers: patterns of names of quantized layers, of which those that match get a term; by default all but the
            output head.
        start: ``weighted`` takes up what is best by the inputs of each layer in the quantized model (EoRA); ``plain``
            takes up the error of the weights themselves (LoftQ's first step), and needs no calibration.
        trained: train the terms from where they start, towards what the float model says of every token.
        rate: the learning rate of that training, relative to the terms' size at the start.
    """

    rank: Annotated[int, Field(strict=True, ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    layers: Patterns = ()
    start: Start = "weighted"
    trained: Flag = True
    rate: Annotated[float, Field(gt=0, le=1)] = 3e-2

    def notes(self) -> list[str]:
        """What the user should know of them."""
        if self.rank in SERVED:
            return []
        above = next((rank for rank in SERVED if rank > self.rank), None)
        served = f"as if it were {above}" if above else "not at all"
        return [f"rank {self.rank} is none of those of vLLM ({', '.join(map(str, SERVED))}), which serves it {served}"]
