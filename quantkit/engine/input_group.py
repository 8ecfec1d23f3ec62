"""A group of layers that share an input, with what is gathered of it batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from quantkit.engine.batches import Batch
from quantkit.engine.layers import Layer
from quantkit.engine.mismatch import Lost, MismatchGatherer
from quantkit.engine.statistics import Gatherer, Sums
from quantkit.methods.base import InputStatistics


@dataclass(frozen=True, slots=True)
class Part:
    """What a batch adds to a group, for the process that owns it.

    Attributes:
        gathered: to its statistics.
        judged: to those of what is held out, by layer.
        lost: to what its input lost.
    """

    gathered: Sums | None = None
    judged: Mapping[str, Sums] = field(default_factory=dict)
    lost: Lost | None = None


@dataclass(slots=True)
class Group:
    """Layers of a segment that share an input, the one that is called first at the head.

    Attributes:
        layers: by their names.
        gatherer: of the statistics of the input.
        solved: whether they are.
        mismatch: gathers what the input lost, where that is wanted.
        judges: gather that of the batches that are held out, where there are some, by the layers whose errors it
            tells.
        is_dealt: what batches add is kept for the process that owns the group, see :meth:`take_parts`.
    """

    layers: dict[str, Layer]
    gatherer: Gatherer
    solved: bool = False
    mismatch: MismatchGatherer | None = None
    judges: Mapping[str, Gatherer] = field(default_factory=dict)
    is_dealt: bool = False
    _parts: list[Part] = field(default_factory=list)

    @classmethod
    def of(cls, layers: dict[str, Layer]) -> Group:
        """Layers of which nothing is gathered."""
        return cls(layers, Gatherer(frozenset()))

    @property
    def name(self) -> str:
        """Of the layer that is called first."""
        return next(iter(self.layers))

    @property
    def leader(self) -> nn.Module:
        """The module of the layer that is called first."""
        return next(iter(self.layers.values())).module

    def add(self, inputs: torch.Tensor, batch: Batch, *, alone: bool = False) -> None:
        """Take in the inputs of one batch; see :meth:`Gatherer.add`.

        Args:
            inputs: ``[..., in_features]``.
            batch: whose they are.
            alone: for its statistics alone, and not for what its inputs lost.
        """
        if self.is_dealt:
            self._parts.append(Part(self.gatherer.of_batch(inputs, batch)) if alone else self._part(inputs, batch))
            return
        if alone:
            self.gatherer.add(inputs, batch)
            return
        if batch.held_out:
            for judge in self.judges.values():
                judge.add(inputs, batch)
            return
        self.gatherer.add(inputs, batch)
        if self.mismatch is not None:
            self.mismatch.add(inputs, batch)

    def _part(self, inputs: torch.Tensor, batch: Batch) -> Part:
        if batch.held_out:
            return Part(judged={name: judge.of_batch(inputs, batch) for name, judge in self.judges.items()})
        gathered = self.gatherer.of_batch(inputs, batch)
        return Part(gathered, lost=None if self.mismatch is None else self.mismatch.of_batch(inputs, batch))

    def take_parts(self) -> list[Part]:
        """What batches added since this was last asked."""
        parts, self._parts = self._parts, []
        return parts

    def absorb(self, part: Part) -> None:
        """Add what a batch adds, to the statistics that are kept here."""
        if part.gathered is not None:
            self.gatherer.absorb(part.gathered)
        for name, sums in part.judged.items():
            self.judges[name].absorb(sums)
        if part.lost is not None and self.mismatch is not None:
            self.mismatch.absorb(part.lost)

    def result(self) -> InputStatistics:
        """What was gathered, with what the inputs lost where that was, too; see :meth:`Gatherer.result`."""
        found = self.judged(self.gatherer.result())
        if self.mismatch is not None and found.gram is not None:
            found.mismatch = self.mismatch.result()
        return found

    def judged(self, found: InputStatistics) -> InputStatistics:
        """Statistics with those of the batches that are held out."""
        if not self.judges:
            return found
        return replace(found, held_out={name: judge.result() for name, judge in self.judges.items()})

    def weights(self) -> int:
        """Number of weights of its layers."""
        return sum(layer.weight.numel() for layer in self.layers.values())

    def columns(self) -> int:
        """Width of the input."""
        return next(iter(self.layers.values())).shape[1]

    def numbers(self) -> int:
        """How many numbers its statistics are, of an expert: a Gram matrix, and what its input lost."""
        columns, rows = self.columns(), sum(layer.shape[0] for layer in self.layers.values())
        return (1 + len(self.judges)) * columns**2 + (0 if self.mismatch is None else self.mismatch.size(rows, columns))
