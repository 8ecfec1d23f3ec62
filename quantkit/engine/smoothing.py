"""Smoothing places: where the inputs of layers can be scaled without changing the model.

Layers that read an input may have their columns multiplied by a factor per channel if whatever makes the input
divides its channels by the same: a norm before them, or a layer whose output passes through unmixed, as
``v_proj`` does to ``o_proj`` and ``up_proj`` to ``down_proj``. That is the smoothing of SmoothQuant
(arXiv:2211.10438) and AWQ (arXiv:2306.00978). Here it is found by trying, not from a table of model names: the
parameters of a candidate are doubled in some channels, and the input must double in the same ones; then the
layers that read it are halved, and what the segment adds to its input must be what it was.

Factors of two are exact in floating point, so nearly the same is not enough. Differences are taken element by element
at the input, and token by token against what the segment adds to this token at its output: activations of a few
tokens and channels are thousands of times larger than all others, and must not hide what happens to these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.engine.groups import Enough, hooked
from quantkit.engine.layers import is_linear
from quantkit.system.host import decide
from quantkit.transforms.base import SmoothingPlace
from quantkit.transforms.channel_scales import scaled_rows

TOLERANCE = 1e-3
"""Relative difference that counts as none, where factors are exact."""
ROUNDINGS = 2
"""The same in roundings of the dtype, where a norm stores its weight less 1 and so a doubled one is rounded."""

COMPARED = 1 << 20
"""Numbers that are compared at once."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A segment that can be run on a few tokens.

    Attributes:
        module: the segment, with its weights.
        inputs: its Linear layers by the input that they read, in the order of their calls; relative names.
        run: runs it and returns what it returns.
        given: the tensors that it is given; the hidden states are among them.
        shared: modules whose parameters other segments have, too; nothing is scaled there.
    """

    module: nn.Module
    inputs: Sequence[Sequence[str]]
    run: Callable[[], Any]
    given: Sequence[torch.Tensor]
    shared: frozenset[str] = frozenset()

    def update(self) -> torch.Tensor:
        """What the segment adds to its hidden states, float32 ``[tokens, features]``."""
        returned = self.run()
        hidden: torch.Tensor = returned[0] if isinstance(returned, tuple) else returned
        after = hidden.detach().float().reshape(-1, hidden.shape[-1])
        return after - self.hidden_like(after)

    def hidden_like(self, after: torch.Tensor) -> torch.Tensor:
        """The hidden states that it is given, of the shape of those that it returns; zeros where it is given none."""
        for each in self.given:
            if each.shape[-1] == after.shape[-1] and each.numel() == after.numel():
                return each.float().reshape(after.shape)
        return torch.zeros_like(after)


@dataclass(frozen=True, slots=True)
class SmoothingFinder:
    """Tries smoothing places on one segment.

    Args:
        trial: the segment.
    """

    trial: Trial

    def find(self) -> list[SmoothingPlace]:
        """The places of this segment: at most one per input."""
        before = self.trial.update()
        found = []
        for index, layers in enumerate(self.trial.inputs):
            place = self._place(index, tuple(layers))
            if place is not None and self.leaves_output(place, before):
                found.append(place)
        return found

    def confirms(self, places: Sequence[SmoothingPlace]) -> bool:
        """Whether places that were found in a segment of the same structure are there too."""
        before = self.trial.update()
        return all(self.leaves_output(place, before) for place in places)

    def leaves_output(self, place: SmoothingPlace, before: torch.Tensor) -> bool:
        """Whether the segment adds what it did when half the channels are doubled and the layers that read it halved.

        Args:
            place: to be tried.
            before: what the segment adds as it is, see :meth:`Trial.update`.
        """
        weight = self._module.get_parameter(f"{place.smooth_layer}.weight")
        pattern = _alternating(weight.shape[0], before.device)
        applied = pattern if not place.offset else _applied(weight, pattern, place.offset)
        factors = applied if place.channels is None else applied[place.channels]
        with ExitStack() as undone:
            undone.enter_context(self._scaled(place.smooth_layer, pattern, place.offset))
            for layer in place.balance_layers:
                undone.enter_context(self._changed(layer, {"weight": partial(_divided, factors)}))
            found = self.trial.update()
        allowed = _tolerance(weight, place.offset) * before.norm(dim=-1)
        if place.offset:
            allowed += torch.finfo(weight.dtype).eps * self.trial.hidden_like(before).norm(dim=-1)
        return decide(((found - before).norm(dim=-1) <= allowed).all())

    @property
    def _module(self) -> nn.Module:
        return self.trial.module

    def _place(self, index: int, layers: tuple[str, ...]) -> SmoothingPlace | None:
        plain = self._input_of(layers[0]) if self.trial.shared.isdisjoint(layers) else None
        if plain is None:
            return None
        candidates = self._candidates(index, plain.shape[1])
        for name, channels in (each for each in candidates if each[0] not in self.trial.shared):
            place = self._tried(layers, name, channels, plain)
            if place is not None:
                return place
        return None

    def _candidates(self, index: int, width: int) -> Iterator[tuple[str, int]]:
        """Norms of this width, then the layers that are called before, the nearest first; with their channels."""
        for name, module in self._module.named_modules():
            weight = getattr(module, "weight", None)
            if not is_linear(module) and isinstance(weight, nn.Parameter) and weight.shape == (width,):
                yield name, width
        for names in reversed(self.trial.inputs[:index]):
            for name in reversed(names):
                features = self._module.get_submodule(name).out_features
                if isinstance(features, int) and width % features == 0:
                    yield name, features

    def _tried(self, layers: tuple[str, ...], name: str, channels: int, plain: torch.Tensor) -> SmoothingPlace | None:
        if channels < plain.shape[1]:
            shared = self._shared_channels(layers[0], name, channels, plain)
            return None if shared is None else SmoothingPlace(layers, name, 0.0, shared, channels)
        pattern = _alternating(channels, plain.device)
        weight = self._module.get_parameter(f"{name}.weight")
        is_norm = not is_linear(self._module.get_submodule(name))
        for offset in (0.0, 1.0) if is_norm else (0.0,):
            with self._scaled(name, pattern, offset):
                doubled = self._input_of(layers[0])
            applied = pattern if not offset else _applied(weight, pattern, offset)
            if doubled is not None and _close(doubled, plain, applied, _tolerance(weight, offset)):
                return SmoothingPlace(layers, name, offset)
        return None

    def _shared_channels(self, reader: str, name: str, channels: int, plain: torch.Tensor) -> torch.Tensor | None:
        """The smooth layer's channel of each input channel, read off bit by bit: those with the bit set double."""
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
            if not _close(doubled, plain, 1.0 + grown, TOLERANCE):
                return None
            found |= grown.long() << bit
        return found if decide((found < channels).all()) and decide((size > 0).all()) else None

    def _input_of(self, layer: str) -> torch.Tensor | None:
        """What a layer is given in a run, float32 ``[tokens, in_features]``; None if the run does not call it."""
        seen: list[torch.Tensor] = []

        def look(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).float())
            raise Enough

        with hooked([(self._module.get_submodule(layer), look)]), suppress(Enough):
            self.trial.run()
        return seen[0] if seen else None

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
        parameters = dict(self._module.get_submodule(name).named_parameters(recurse=False))
        kept = {leaf: parameter.data for leaf, parameter in parameters.items()}
        try:
            for leaf, change in changes.items():
                if leaf in parameters:
                    parameters[leaf].data = change(kept[leaf])
            yield
        finally:
            for leaf, parameter in parameters.items():
                parameter.data = kept[leaf]


def _divided(factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (weight.float() / factors).to(weight.dtype)


def _applied(weight: torch.Tensor, factors: torch.Tensor, offset: float) -> torch.Tensor:
    """What a norm multiplies by, relative to before, float32 ``[channels]``; its weight is rounded less the offset."""
    plain = weight.float() + offset
    scaled = scaled_rows(weight, factors, offset).float() + offset
    return torch.where(plain == 0, factors, scaled / plain)


def _tolerance(weight: torch.Tensor, offset: float) -> float:
    return max(TOLERANCE, ROUNDINGS * torch.finfo(weight.dtype).eps) if offset else TOLERANCE


def _alternating(channels: int, device: torch.device) -> torch.Tensor:
    """1 and 2 in an order that no permutation of heads or halves leaves as it is."""
    generator = torch.Generator().manual_seed(channels)
    return 1.0 + torch.randint(2, (channels,), generator=generator).float().to(device)


def _close(found: torch.Tensor, plain: torch.Tensor, factors: torch.Tensor, tolerance: float) -> bool:
    """Whether each element is the plain one times its channel's factor, and not all are nothing.

    It is never so where routing gave it other tokens. Some tokens are compared at a time, which takes less memory.
    """
    if found.shape != plain.shape:
        return False
    same, any_there = [], []
    step = max(1, COMPARED // plain.shape[1])
    for one, other in zip(torch.split(found, step), torch.split(plain, step), strict=True):
        wanted = other * factors
        same.append(((one - wanted).abs() <= tolerance * wanted.abs()).all())
        any_there.append(wanted.any())
    return decide(torch.stack(same).all() & torch.stack(any_there).any())
