"""Runs of a segment with other parameters, compared with what it gives as it is: by these a transform learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.func import functional_call

from quantkit.engine.batches import Batch
from quantkit.engine.passes import AtSegment, output_of
from quantkit.engine.segment import Segment
from quantkit.engine.tuning import Example, divided


@dataclass(frozen=True, slots=True)
class SegmentRuns:
    """See :class:`quantkit.transforms.base.BlockRuns`.

    Attributes:
        segment: it is loaded, and nothing of it is solved.
        examples: what batches bring to it, and what it makes of them as it is.
    """

    segment: Segment
    examples: Sequence[Example]

    @classmethod
    def of(cls, segment: Segment, places: Sequence[tuple[Batch, AtSegment]]) -> SegmentRuns:
        """The runs of batches that stand before a segment, those aside that are held out."""
        examples = []
        for batch, place in places:
            if not batch.held_out:
                example = Example(batch, place, torch.empty(0))
                args, kwargs = example.arguments()
                with torch.no_grad():
                    target = output_of(segment.module(*args, **kwargs)).detach().clone()
                examples.append(Example(batch, place, target))
        return cls(segment, examples)

    def divided(self, share: float) -> tuple[list[int], list[int]]:
        """The places of batches that are held out, and of the others; of a single batch in both."""
        if len(self.examples) < 2:
            return [0][: len(self.examples)], [0][: len(self.examples)]
        numbers = {id(each): number for number, each in enumerate(self.examples)}
        held, train = divided(self.examples, share)
        return [numbers[id(each)] for each in held], [numbers[id(each)] for each in train]

    def error(self, place: int, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The mean square of what the output of a batch is off by with other parameters, 0-d float32."""
        example, module, start = self.examples[place], self.segment.module, len(self.segment.prefix) + 1
        own = dict(module.named_parameters())
        cast = {name[start:]: each.to(own[name[start:]].dtype) for name, each in parameters.items()}
        args, kwargs = example.arguments()
        return example.error(output_of(functional_call(module, cast, args, kwargs)))
