"""Where the inputs of layers can be scaled without changing the model.

Layers that read an input may have their columns multiplied by a factor per channel if whatever makes the input
divides its channels by the same: a norm before them, or a layer whose output passes through unmixed, as
``v_proj`` does to ``o_proj`` and ``up_proj`` to ``down_proj``. That is the folding of SmoothQuant
(arXiv:2211.10438) and AWQ (arXiv:2306.00978). Here it is found by trying, not from a table of model names: the
parameters of a candidate are doubled in some channels, and the input must double in the same ones; then the
readers are halved, and the segment's output must be what it was. Factors of two are exact in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from quantkit.engine.groups import Enough, hooked
from quantkit.system.host import decide

TOLERANCE = 0.02
"""Of the largest magnitude: well above what 16-bit arithmetic loses, well below a factor of two in a channel."""


@dataclass(frozen=True, slots=True)
class Fold:
    """An input whose channels can be scaled. Names are relative to the segment.

    Attributes:
        readers: the Linear layers that read it; each column is multiplied by its channel's factor.
        producer: the module that makes it; each output channel is divided.
        offset: added to the producer's weight before it is applied, as some norms add 1.
        channels: int64 ``[in_features]``, the producer's channel of each input channel where several share one (as
            the heads of grouped-query attention do), or None where they are the same.
        width: the producer's channels, where they are fewer.
    """

    readers: tuple[str, ...]
    producer: str
    offset: float = 0.0
    channels: torch.Tensor | None = None
    width: int = 0

    def of_producer(self, factors: torch.Tensor) -> torch.Tensor:
        """Factors per input channel as factors per output channel of the producer; those that share one are equal."""
        if self.channels is None:
            return factors
        found = torch.ones(self.width, device=factors.device)
        return found.index_copy_(0, self.channels.to(factors.device), factors)


def scaled_rows(parameter: torch.Tensor, factors: torch.Tensor, offset: float) -> torch.Tensor:
    """A producer's weight or bias with each output channel multiplied; the offset is that of a norm's weight."""
    factors = factors.view(-1, *[1] * (parameter.ndim - 1)).to(parameter.dtype)
    return (parameter + offset) * factors - offset if offset else parameter * factors


@dataclass(frozen=True, slots=True)
class FoldFinder:
    """Tries folds on one segment.

    Args:
        module: the segment, with its weights.
        inputs: the Linear layers by the input that they read, in the order of their calls; relative names.
        run: runs the segment on a few tokens and returns its output.
    """

    module: nn.Module
    inputs: Sequence[Sequence[str]]
    run: Callable[[], torch.Tensor]

    def find(self) -> list[Fold]:
        """The folds of this segment: at most one per input."""
        before = self.run()
        found = []
        for place, readers in enumerate(self.inputs):
            fold = self._fold(place, tuple(readers))
            if fold is not None and self._leaves_output(before, fold):
                found.append(fold)
        return found

    def confirms(self, folds: Sequence[Fold]) -> bool:
        """Whether folds that were found in a segment of the same structure hold here too."""
        before = self.run()
        return all(self._leaves_output(before, fold) for fold in folds)

    def _fold(self, place: int, readers: tuple[str, ...]) -> Fold | None:
        plain = self._input_of(readers[0])
        if plain is None:
            return None
        for name, channels in self._candidates(place, plain.shape[1]):
            fold = self._tried(readers, name, channels, plain)
            if fold is not None:
                return fold
        return None

    def _candidates(self, place: int, width: int) -> Iterator[tuple[str, int]]:
        """Norms of this width, then the layers that are called before, the nearest first; with their channels."""
        for name, module in self.module.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(module, nn.Linear) and isinstance(weight, nn.Parameter) and weight.shape == (width,):
                yield name, width
        for names in reversed(self.inputs[:place]):
            for name in reversed(names):
                features = self.module.get_submodule(name).out_features
                if isinstance(features, int) and width % features == 0:
                    yield name, features

    def _tried(self, readers: tuple[str, ...], name: str, channels: int, plain: torch.Tensor) -> Fold | None:
        if channels < plain.shape[1]:
            shared = self._shared_channels(readers[0], name, channels, plain)
            return None if shared is None else Fold(readers, name, 0.0, shared, channels)
        pattern = _alternating(channels, plain.device)
        is_norm = not isinstance(self.module.get_submodule(name), nn.Linear)
        for offset in (0.0, 1.0) if is_norm else (0.0,):
            with self._scaled(name, pattern, offset):
                doubled = self._input_of(readers[0])
            if doubled is not None and _close(doubled, plain * pattern):
                return Fold(readers, name, offset)
        return None

    def _shared_channels(self, reader: str, name: str, channels: int, plain: torch.Tensor) -> torch.Tensor | None:
        """The producer's channel of each input channel, read off bit by bit: those with the bit set are doubled."""
        found = torch.zeros(plain.shape[1], dtype=torch.int64, device=plain.device)
        numbers = torch.arange(channels, device=plain.device)
        size = plain.abs().sum(0)
        for bit in range((channels - 1).bit_length()):
            is_set = (numbers >> bit) & 1
            with self._scaled(name, 1.0 + is_set, 0.0):
                doubled = self._input_of(reader)
            if doubled is None:
                return None
            grown = doubled.abs().sum(0) > 1.5 * size
            if not _close(doubled, plain * (1.0 + grown)):
                return None
            found |= grown.long() << bit
        return found if decide((found < channels).all()) and decide((size > 0).all()) else None

    def _input_of(self, layer: str) -> torch.Tensor | None:
        """What a layer is given in a run, float32 ``[tokens, in_features]``; None if the run does not call it."""
        seen: list[torch.Tensor] = []

        def look(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).float())
            raise Enough

        with hooked([(self.module.get_submodule(layer), look)]), suppress(Enough):
            self.run()
        return seen[0] if seen else None

    def _leaves_output(self, before: torch.Tensor, fold: Fold) -> bool:
        """Whether the output stays when the producer is doubled in every other channel and its readers are halved."""
        weight = self.module.get_parameter(f"{fold.producer}.weight")
        pattern = _alternating(weight.shape[0], before.device)
        factors = pattern if fold.channels is None else pattern[fold.channels]
        with ExitStack() as undone:
            undone.enter_context(self._scaled(fold.producer, pattern, fold.offset))
            for reader in fold.readers:
                undone.enter_context(self._changed(reader, {"weight": partial(_halved, factors)}))
            return _close(self.run(), before)

    @contextmanager
    def _scaled(self, name: str, factors: torch.Tensor, offset: float) -> Iterator[None]:
        changes = {
            "weight": lambda parameter: scaled_rows(parameter, factors, offset),
            "bias": lambda parameter: scaled_rows(parameter, factors, 0.0),
        }
        with self._changed(name, changes):
            yield

    @contextmanager
    def _changed(self, name: str, changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
        """Other values for a module's parameters while the block runs."""
        parameters = dict(self.module.get_submodule(name).named_parameters(recurse=False))
        kept = {leaf: parameter.data for leaf, parameter in parameters.items()}
        try:
            for leaf, change in changes.items():
                if leaf in parameters:
                    parameters[leaf].data = change(kept[leaf])
            yield
        finally:
            for leaf, parameter in parameters.items():
                parameter.data = kept[leaf]


def _halved(factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight / factors.to(weight.dtype)


def _alternating(channels: int, device: torch.device) -> torch.Tensor:
    """1 and 2 in an order that no permutation of heads or halves leaves as it is."""
    generator = torch.Generator().manual_seed(channels)
    return 1.0 + torch.randint(2, (channels,), generator=generator).float().to(device)


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    largest = wanted.abs().amax()
    return decide(((found - wanted).abs().amax() <= TOLERANCE * largest) & (largest > 0))
