"""What held-out rows said of a training so far: which of its states is the best, and whether it goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

from quantkit.errors import QuantizationError

RISES = 3
"""How often in a row the held-out rows may see the loss rise before the training ends."""
ENDS = "the training ends with the best so far"


@dataclass(slots=True)
class Verdicts:
    """Divergences on the rows that are held out.

    Attributes:
        history: the steps and divergences at which was judged.
        best: name of the file that keeps the best state; None while none is better than what there was.
        notes: what the user should know; one ends the training.
    """

    history: list[tuple[int, float]] = field(default_factory=list)
    best: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def go_on(self) -> bool:
        """Whether nothing has ended the training before its last step."""
        return not self.notes

    def end(self, step: int, why: str) -> None:
        """End it."""
        self.notes.append(f"step {step}: {why}; {ENDS}")

    def add(self, step: int, found: float) -> bool:
        """A divergence, in nats; returns whether it is the best, which is to be kept as :attr:`best`.

        Raises:
            QuantizationError: it is the first, and not finite.
        """
        before = [each for _, each in self.history]
        if not math.isfinite(found):
            if not before:
                raise QuantizationError("the quantized model's divergence is not finite", "export it again")
            self.end(step, "the loss is not finite")
            return False
        self.history.append((step, found))
        last = [each for _, each in self.history[-RISES - 1 :]]
        if len(last) > RISES and all(one < other for one, other in pairwise(last)):
            self.end(step, "held-out rows see it get worse")
        if not before or found >= min(before):
            return False
        self.best = f"best-{step}.safetensors"
        return True
