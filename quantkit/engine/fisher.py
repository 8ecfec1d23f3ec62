"""What tokens and rows matter: second moments of the gradient of the model's loss at the outputs of its layers.

The loss of a row of tokens is the sum of the negative log-likelihoods of labels that are drawn from the model itself,
one after every token. Then the mean outer product of its gradient is the Hessian of the divergence from the model
(Fisher's information), and errors of a layer's outputs cost about half the sum of squared gradients times squared
errors. Kept of it are the means over the rows of a layer, by token, and over tokens, by row. GuidedQuant (Kim et al.
2025, arXiv:2505.07004) and YAQA (Tseng et al. 2025, arXiv:2505.22988) build on the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.engine.batches import Batch, row_starts
from quantkit.engine.kept_calls import Keep, on_device
from quantkit.engine.layers import Layer
from quantkit.engine.reverse import ReverseWalk, from_checkpoint
from quantkit.engine.routing import now_given
from quantkit.engine.segment import Segment, WeightReader
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import QuantizationError
from quantkit.system.host import decide


@dataclass(frozen=True, slots=True)
class LayerFisher:
    """Second moments of the gradient at the outputs of a layer.

    Attributes:
        rows: float32 ``[out_features]``, the mean over the tokens that it was given.
        seen: how many these are.
        tokens: float32 ``[seen]``, the mean over rows; None where nobody tells which tokens these are.
        places: int32 ``[seen]``, which calibration tokens; None for all of them in their order.
    """

    rows: torch.Tensor
    seen: int
    tokens: torch.Tensor | None
    places: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Fisher:
    """What a model's layers are sensitive to.

    Attributes:
        layers: by their names, the input embedding among them; without those that no token reached.
        loss: the mean negative log-likelihood of the labels, the entropy of the model, in nats a token.
        tokens: of the calibration.
    """

    layers: dict[str, LayerFisher]
    loss: float
    tokens: int


@dataclass(slots=True)
class _Sums:
    """What comes together of a layer."""

    rows: torch.Tensor
    seen: int = 0
    tokens: list[torch.Tensor] = field(default_factory=list)
    places: list[torch.Tensor] = field(default_factory=list)
    told: bool = True

    def add(self, squares: torch.Tensor, places: torch.Tensor | None) -> None:
        """Squares ``[tokens, out_features]`` of these calibration tokens; None where nobody tells which."""
        self.rows += squares.sum(0)
        self.seen += len(squares)
        self.told = self.told and places is not None
        if places is not None:
            self.tokens.append(squares.mean(1))
            self.places.append(places)

    def result(self, total: int) -> LayerFisher:
        """Of ``total`` calibration tokens."""
        rows = (self.rows / self.seen).cpu()
        if not self.told:
            return LayerFisher(rows, self.seen, None)
        places, order = torch.cat(self.places).cpu().sort(stable=True)
        tokens = torch.cat(self.tokens).cpu()[order]
        if len(places) == total and torch.equal(places, torch.arange(total)):
            return LayerFisher(rows, self.seen, tokens)
        known, index = torch.unique(places, return_inverse=True)  # a layer may be called with a token twice
        together = torch.zeros(len(known)).index_add_(0, index, tokens)
        return LayerFisher(rows, self.seen, together, known.to(torch.int32))


@dataclass(slots=True)
class FisherSweep:
    """One run of a model forward and backward that looks at the gradients at its layers.

    Args:
        skeleton: the model.
        reader: where weights come from.
        batches: the calibration tokens.
        device: where it is computed.
        dtype: of the passes; float16 gives way to bfloat16, whose gradients do not underflow.
        seed: of the labels.
        keep: where what segments are given waits, see :class:`ReverseWalk`.
        on_step: see there.
    """

    skeleton: Skeleton
    reader: WeightReader
    batches: Sequence[Batch]
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    keep: Keep = on_device
    on_step: Callable[[int, int], None] = lambda _done, _total: None
    _walk: ReverseWalk = field(init=False)
    _found: dict[str, _Sums] = field(init=False, default_factory=dict)
    _starts: torch.Tensor = field(init=False)
    _draws: torch.Tensor = field(init=False)
    _places: dict[int, torch.Tensor] = field(init=False, default_factory=dict)

    def run(self) -> Fisher:
        """Look at all layers of the blocks, at the head and at the input embedding.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
            QuantizationError: the model's code fails on the batches, or a gradient is not finite.
        """
        self._starts, total = row_starts(self.batches)
        self._draws = torch.rand(total, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        self._places = {id(batch): batch.places(self._starts) for batch in self.batches}
        self._found.clear()
        dtype = torch.bfloat16 if self.dtype == torch.float16 else self.dtype
        plain = from_checkpoint(self.skeleton, self.reader, self.device, dtype)

        @contextmanager
        def loaded(segment: Segment, for_gradients: bool) -> Iterator[None]:
            with plain(segment, for_gradients), ExitStack() as hooks:
                for layer in segment.layers if for_gradients else ():
                    hooks.callback(layer.module.register_forward_hook(self._hook(layer)).remove)
                yield

        sees = any(batch.inputs for batch in self.batches)
        walk = ReverseWalk(self.skeleton, self.reader, self.device, dtype, loaded, self.keep, sees, self.on_step)
        self._walk = walk
        with walk, ExitStack() as hooks:
            if self.skeleton.embedding is not None:
                for layer in self.skeleton.embedding.layers:
                    hooks.callback(layer.module.register_forward_hook(self._hook(layer, _scale)).remove)
            loss = walk.run(self.batches, self._loss)
        layers = {name: sums.result(total) for name, sums in self._found.items() if sums.seen}
        for name, each in layers.items():
            if not decide(each.rows.isfinite().all()):
                raise QuantizationError(
                    f"{name}: the gradient of the model's loss at its output is NaN or infinite",
                    "the activations of the model overflow: give a model in bfloat16 or float32",
                )
        return Fisher(layers, loss / total, total)

    def _loss(self, logits: torch.Tensor, batch: Batch, places: torch.Tensor) -> torch.Tensor:
        """The negative log-likelihood of labels drawn from the model, one for each token."""
        said = logits.float().log_softmax(-1)
        draws = self._draws[self._places[id(batch)][places].cpu()].to(said.device)
        with torch.no_grad():
            below = said.double().exp().cumsum(-1)
            labels = torch.searchsorted(below, draws[:, None] * below[:, -1:]).clamp(max=said.shape[-1] - 1)
        return -said.gather(1, labels).sum()

    def _hook(
        self, layer: Layer, scale: Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor] | None = None
    ) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """Looks at the gradient at the outputs of a layer, which are ``scale`` times what its weight gives."""

        def hook(module: nn.Module, given_to: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, torch.Tensor) or not torch.is_grad_enabled():
                return
            if not output.requires_grad:
                output.requires_grad_()
            batch, chunk = self._walk.batch, self._walk.chunk
            given = None if batch is None else now_given(batch.token_ids.numel())
            positions = None if given is None else given.positions
            if batch is not None:
                factor = None if scale is None else scale(module, given_to, output)
                take = partial(self._add, layer.name, batch, positions, chunk, factor)
                output.register_hook(take)  # type: ignore[no-untyped-call]  # torch gives it no types

        return hook

    def _add(
        self,
        name: str,
        batch: Batch,
        positions: torch.Tensor | None,
        chunk: torch.Tensor | None,
        factor: torch.Tensor | None,
        gradient: torch.Tensor,
    ) -> None:
        """Take in the gradient of a batch at the outputs of a layer.

        Args:
            name: of the layer.
            batch: whose tokens these are.
            positions: for an expert which positions of the batch.
            chunk: for the head which of the batch's tokens.
            factor: by which the outputs are what the weight gives, 0-d; None for 1.
            gradient: ``[..., out_features]``.
        """
        flat = gradient.detach().reshape(-1, gradient.shape[-1]).float().square()
        flat = flat if factor is None else flat * factor.square()
        own, whole = self._places[id(batch)], batch.token_ids.numel()
        if chunk is not None:
            places = own[chunk]
        elif positions is None and len(flat) != whole:
            places = None
        else:
            flat, found = batch.tokens_of(flat, positions)
            places = own if found is None else own[found]
        if name not in self._found:
            self._found[name] = _Sums(torch.zeros(flat.shape[1], device=flat.device))
        self._found[name].add(flat, places)


def _scale(module: nn.Module, given: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """By which an embedding multiplies the rows that it looks up, 0-d, as that of Gemma does."""
    with torch.no_grad():
        rows: torch.Tensor = nn.functional.embedding(given[0], module.weight)  # type: ignore[arg-type]  # it has one
        scale: torch.Tensor = output.detach().float().norm() / rows.float().norm().clamp(min=1e-30)
        return scale
