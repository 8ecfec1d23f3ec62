"""Low-rank terms for the layers of a quantized model, block by block.

Each takes up what is best of ``W - W_hat`` in a rank, weighed by the inputs that the layer is given in the quantized
model (:mod:`quantkit.numerics.low_rank`). A block is loaded, its inputs are seen, its terms are found and added; then
the passes go on through it, so that the blocks behind it are calibrated on what is left of the error before them.
Memory holds one block, its Gram matrices and the activations. Without calibration tokens no pass is run, and all
inputs count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from quantkit.engine.batches import Batch
from quantkit.engine.gathering import Gathering
from quantkit.engine.layers import Layer
from quantkit.engine.pausing import pause_at
from quantkit.engine.segment import Segment, WeightReader
from quantkit.engine.skeleton import Skeleton
from quantkit.methods.base import InputStatistics, Statistic
from quantkit.numerics.factor import damped
from quantkit.numerics.low_rank import LowRank, aligned, closest

DAMPING = 0.01
"""Share of the mean diagonal of a Gram matrix that is added to it: channels that the texts leave silent count a bit."""


@dataclass(frozen=True, slots=True)
class Term:
    """What was found for a layer.

    Attributes:
        layer: it.
        low_rank: the term, on the CPU.
        error: the mean square of the output's error without it, relative to the output's mean square.
        error_left: the same with it.
        distance: the square of the weight's own error, relative to the square of the weight.
        tokens: calibration tokens by which it was weighed; 0 where it is the plain SVD of the error.
    """

    layer: Layer
    low_rank: LowRank
    error: float
    error_left: float
    distance: float
    tokens: int


@dataclass(slots=True)
class LowRankWalk:
    """One walk over a quantized model.

    Args:
        skeleton: of the quantized model.
        reader: its weights, decoded.
        original: gives the float weight of a layer, ``[out_features, in_features]``.
        ranks: path of each layer that gets a term, and its rank.
        batches: calibration tokens on the device; empty for a plain SVD.
        device: where blocks are loaded.
        dtype: of weights and activations in the passes.
        take: is given each term.
        on_segment: called with the number of finished blocks and how many there are.
        room: bytes that statistics of experts may take at a time; None for no limit.
    """

    skeleton: Skeleton
    reader: WeightReader
    original: Callable[[Layer], torch.Tensor]
    ranks: Mapping[str, int]
    batches: Sequence[Batch]
    device: torch.device
    dtype: torch.dtype
    take: Callable[[Term], None]
    on_segment: Callable[[int, int], None] = lambda _done, _total: None
    room: int | None = None
    _streams: Gathering = field(init=False)

    def __post_init__(self) -> None:
        self._streams = Gathering(self.skeleton.text, self.batches, needs=frozenset({Statistic.GRAM}), room=self.room)

    def run(self) -> None:
        """Find all terms.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
            QuantizationError: the model does not run on the batches, or an input is not finite.
        """
        head = self.skeleton.head
        segments = [*self.skeleton.segments]
        if head is not None and self._wanted(head):
            segments.append(head)
        with torch.no_grad(), ExitStack() as cleanup:
            if self.batches:
                self.skeleton.load_frame(self.reader, self.device, self.dtype)
                pause_at(segments, self.skeleton.text.get_output_embeddings(), cleanup)
                self._streams.start(segments, cleanup)
            for done, segment in enumerate(segments, start=1):
                wanted = self._wanted(segment)
                if self.batches or wanted:
                    self._pass(segment, wanted, last=done == len(segments))
                self.on_segment(done, len(segments))

    def _wanted(self, segment: Segment) -> dict[str, Layer]:
        return {layer.name: layer for layer in segment.layers if layer.path in self.ranks}

    def _pass(self, segment: Segment, wanted: dict[str, Layer], *, last: bool) -> None:
        self.skeleton.load(segment, self.reader, self.device, self.dtype)
        try:
            reached = bool(self.batches) and bool(self._streams.at(segment))
            for layers, statistics in self._statistics(segment, wanted) if reached else [(wanted, InputStatistics())]:
                for layer in layers.values():
                    self._solve(layer, statistics)
            if reached and not last:
                self._streams.advance(segment)
        finally:
            self.skeleton.unload(segment)

    def _statistics(
        self, segment: Segment, wanted: dict[str, Layer]
    ) -> Iterator[tuple[dict[str, Layer], InputStatistics]]:
        """The layers of each input with what was gathered of it; all of a block's but those of experts at once."""
        if segment.is_layer:
            group = self._streams.group(wanted)
            yield wanted, self._streams.read_before(segment, group)
            return
        found = self._streams.steps(segment, wanted)
        plain = [step for step in found if not step.experts]
        known = self._streams.observe(segment, plain)
        for step in plain:
            yield step.group.layers, known[step.group.name]
        for step in found:
            if step.experts:
                for _, part in self._streams.gather_experts(segment, step, self.device):
                    yield from ((group.layers, statistics) for group, statistics in part)

    def _solve(self, layer: Layer, statistics: InputStatistics) -> None:
        packed = self.skeleton.read(f"{layer.path}.weight", self.reader.read_finite).to(self.device, torch.float32)
        weight = aligned(self.original(layer).to(self.device, torch.float32), packed)
        gram = None if statistics.gram is None else damped(statistics.gram, DAMPING)
        error = weight - packed
        found = closest(error, gram, self.ranks[layer.path])
        added = found.product()
        energy = _energy(weight, gram)
        layer.put(packed + added)
        self.take(
            Term(
                layer,
                LowRank(found.down.cpu(), found.up.cpu()),
                _energy(error, gram) / energy,
                _energy(error - added, gram) / energy,
                _energy(error, None) / _energy(weight, None),
                statistics.tokens if gram is not None else 0,
            )
        )


def _energy(weight: torch.Tensor, gram: torch.Tensor | None) -> float:
    """The mean square of what a weight makes of its inputs, times a factor that is the same for all of a layer."""
    weighed = weight if gram is None else weight @ gram
    return max(float((weighed * weight).sum()), torch.finfo(torch.float32).tiny)
