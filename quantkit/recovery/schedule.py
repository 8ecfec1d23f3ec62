"""How a training goes on: its steps and rates, and which rows each step takes and which judge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from quantkit.errors import QuantizationError
from quantkit.recovery.descent import SIGNS


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a training goes on; see :class:`quantkit.recipe.recovering.RecoverOptions`.

    Attributes:
        steps: of the optimizer.
        batch_tokens: tokens of a step, about: whole rows.
        rates: the learning rate of each kind of leaves.
        warmup: share of the steps in which the rates rise.
        hidden: how much the error of hidden states between blocks counts beside the divergence.
        held_out: share of the rows that judge.
        evaluations: how often they do.
        optimizer: of codes, see :class:`quantkit.recovery.descent.Descent`.
        seed: order of the rows.
    """

    steps: int
    batch_tokens: int
    rates: Mapping[str, float]
    warmup: float = 0.1
    hidden: float = 0.0
    held_out: float = 0.05
    evaluations: int = 8
    optimizer: str = SIGNS
    seed: int = 0

    def rate(self, number: int) -> float:
        """What the rates are multiplied with at a step, counted from 0."""
        ramp = max(1.0, self.warmup * self.steps)
        falling = 0.5 * (1 + math.cos(math.pi * number / self.steps))
        return min(1.0, (number + 1) / ramp) * falling

    def judged(self) -> set[int]:
        """Behind how many steps the held-out rows judge."""
        return {round(self.steps * number / self.evaluations) for number in range(1, self.steps + 1)}

    def divided(self, count: int) -> tuple[list[int], list[int]]:
        """The rows that judge, and those that train, of so many.

        Raises:
            QuantizationError: there are too few.
        """
        if count < 4:
            raise QuantizationError(f"{count} rows are too few to train on, as 2 are held out", "give more records")
        order = self._order(count, 0)
        held = min(max(2, round(self.held_out * count)), count - 2)
        return sorted(order[:held]), sorted(order[held:])

    def plan(self, rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """The rows of each step: all of them in an order of their own, again and again.

        Args:
            rows: those that train.
            lengths: tokens of each of all rows.
        """
        found: list[list[int]] = []
        order: list[int] = []
        epoch = 0
        for _ in range(self.steps):
            step: list[int] = []
            tokens = 0
            while tokens < self.batch_tokens and len(step) < len(rows):
                if not order:
                    epoch += 1
                    order = [rows[place] for place in self._order(len(rows), epoch)]
                step.append(order.pop())
                tokens += lengths[step[-1]]
            found.append(step)
        return found

    def _order(self, count: int, epoch: int) -> list[int]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        found: list[int] = torch.randperm(count, generator=draw).tolist()
        return found
