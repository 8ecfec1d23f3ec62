"""Block polish: a solved segment's output is brought closer to the float segment's by a few gradient steps.

A step runs the segment on what the quantized model gives it for one batch and compares what comes out with what the
float model's segment makes of the float model's input. What is trained is linear in the result, the scales of groups
with their codes held, so that few steps are enough (block-wise training of EfficientQAT, arXiv:2407.11062; roundings by
the signs of their gradients, SignRound, arXiv:2309.05516). Some batches are held out: the best that they have seen, as
it is stored, is what is kept, and what they never see improve stays as the method left it.

The gradients of one segment are in memory, and what the batches bring to it and should leave it with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from quantkit.engine.batches import Batch
from quantkit.engine.passes import AtSegment, brought, output_of
from quantkit.engine.tasks import Tuned
from quantkit.methods.tuning import TuneOptions
from quantkit.numerics.trainable import Trainable, can_train
from quantkit.numerics.trained_codes import TrainedCodes, can_train_codes
from quantkit.schemes import QuantizedWeight

LEARNING_RATE = 5e-3
"""Of factors of scales and norms at the first step: a half percent."""
WARM_UP = 5
"""Steps in which the learning rate rises."""
TRIALS = 4
"""How often the held-out batches judge in all steps."""
ROUNDING_REACH = 0.1
"""How far a rounding comes in all steps, in steps of the grid, if the sign of its gradient never turns."""
NEAR = 0.49
"""How far from its code a rounding begins at most, on the side on which the float weight lies."""
BETAS = (0.9, 0.95)
EPSILON = 1e-12
"""Of Adam: gradients of single factors are small beside the loss, which is 1 at the start."""


@dataclass(frozen=True, slots=True)
class Example:
    """What a batch brings to a segment and should leave it with.

    Attributes:
        batch: its tokens.
        place: the arguments of the segment, as the quantized model has them.
        target: what the float model's segment gives, ``[rows, length, features]``.
    """

    batch: Batch
    place: AtSegment
    target: torch.Tensor

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of the segment, on the device on which the batch lies, where passes left them elsewhere meanwhile."""
        device = self.batch.token_ids.device
        return brought(self.place.args, device), brought(self.place.kwargs, device)

    def error(self, output: torch.Tensor) -> torch.Tensor:
        """Mean square of what an output is off by over the tokens, 0-d float32."""
        off = self._tokens(output).float().sub(self._tokens(self.target).float())
        return off.square().mean()

    def added(self) -> torch.Tensor:
        """Mean square of what the float segment adds to its input, or gives where that is of another shape; 0-d."""
        given = next((each for each in self.place.args if isinstance(each, torch.Tensor)), None)
        target = self._tokens(self.target).float()
        if given is None or given.shape != self.target.shape:
            return target.square().mean()
        return target.sub(self._tokens(given).float()).square().mean()

    def _tokens(self, values: torch.Tensor) -> torch.Tensor:
        """``[tokens, features]`` without padding."""
        flat = values.to(self.batch.token_ids.device).reshape(-1, values.shape[-1])
        return flat if self.batch.valid is None else flat.index_select(0, self.batch.valid)


@dataclass(frozen=True, slots=True)
class Vector:
    """A norm or a bias that is trained.

    Attributes:
        start: float32, what it began as.
        change: float32, in units of its root mean square; a leaf.
    """

    LEAST = 0.05
    """The unit where a vector nearly vanishes, as norms do that add 1 to it."""

    start: torch.Tensor
    change: torch.Tensor

    @classmethod
    def of(cls, given: torch.Tensor) -> Vector:
        """A parameter of the segment, which stays as it is."""
        start = given.detach().float().clone()
        return cls(start, torch.zeros_like(start, requires_grad=True))

    def value(self) -> torch.Tensor:
        """What it is now, float32."""
        return self.start + self.change * self.start.square().mean().sqrt().clamp_(min=self.LEAST)


@dataclass(slots=True)
class _Best:
    """What held-out batches liked best.

    Attributes:
        loss: of it.
        weights: solved layers by the names of their weights; None for what the method left.
        floats: by their names in the segment.
        misses: how many trials in a row did not better it.
    """

    loss: float
    weights: dict[str, QuantizedWeight] | None = None
    floats: dict[str, torch.Tensor] = field(default_factory=dict)
    misses: int = 0

    def see(self, loss: float, weights: dict[str, QuantizedWeight], floats: dict[str, torch.Tensor]) -> None:
        """One more trial."""
        if loss < self.loss:
            self.loss, self.weights, self.floats, self.misses = loss, weights, floats, 0
        else:
            self.misses += 1


@dataclass(slots=True)
class _Leaves:
    """What is trained of a segment at a time.

    Args:
        weights: solved layers by the names of their weights in it.
        floats: float parameters, by their names in it.
        options: of the tuning.
        origins: where roundings are trained, the float weights that the layers stand for; else None.
    """

    weights: Mapping[str, QuantizedWeight]
    floats: Mapping[str, torch.Tensor]
    options: TuneOptions
    origins: Mapping[str, torch.Tensor] | None = None
    _layers: dict[str, Trainable | TrainedCodes] = field(init=False)
    _vectors: dict[str, Vector] = field(init=False)
    _still: dict[str, torch.Tensor] = field(init=False)
    _adam: torch.optim.Optimizer | None = field(init=False)

    def __post_init__(self) -> None:
        made = {name: self._trainable(name, each) for name, each in self.weights.items()}
        self._layers = {name: each for name, each in made.items() if each is not None}
        self._vectors = {name: Vector.of(each) for name, each in self.floats.items()}
        self._still = {name: _decoded(self.weights[name]) for name in self.weights.keys() - self._layers.keys()}
        leaves = [*self._by_adam(), *(each.change for each in self._vectors.values())]
        self._adam = torch.optim.Adam(leaves, betas=BETAS, eps=EPSILON) if leaves else None

    def _trainable(self, name: str, weight: QuantizedWeight) -> Trainable | TrainedCodes | None:
        """What of a weight is trained; None for nothing."""
        zeros = "zeros" in self.options.train
        made: Trainable | TrainedCodes
        if self.origins is not None and can_train_codes(weight.scheme):
            made = TrainedCodes.of(weight, self.origins[name], zeros=zeros, within=NEAR)
        elif can_train(weight.scheme):
            made = Trainable.of(weight, zeros=zeros)
        else:
            return None
        leaves = made.parameters()
        leaves["factors"].requires_grad = "scales" in self.options.train
        return made if any(each.requires_grad for each in leaves.values()) else None

    def __bool__(self) -> bool:
        """Whether there is anything to train; with roundings, whether any are trained."""
        if self.rounds:
            return any(isinstance(each, TrainedCodes) for each in self._layers.values())
        return bool(self._layers or self._vectors)

    @property
    def rounds(self) -> bool:
        """Whether roundings are trained, which are good for nothing before they have come to rest."""
        return self.origins is not None

    @property
    def steps(self) -> int:
        """How many are made at most."""
        return self.options.steps_for(rounding=self.rounds)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All parameters as they are now, float32, with a graph back to the leaves."""
        found = {name: each.weight() for name, each in self._layers.items()} | self._still
        return found | {name: each.value() for name, each in self._vectors.items()}

    @torch.no_grad()
    def stored(self) -> tuple[dict[str, QuantizedWeight], dict[str, torch.Tensor]]:
        """The layers that are trained and the float parameters, as they would be stored now."""
        floats = {name: each.value().to(self.floats[name].dtype) for name, each in self._vectors.items()}
        return {name: each.result() for name, each in self._layers.items()}, floats

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """Move the leaves by their gradients, by a share of the learning rates."""
        if self._adam is not None:
            for group in self._adam.param_groups:
                group["lr"] = rate * (self.options.learning_rate or LEARNING_RATE)
            self._adam.step()
            self._adam.zero_grad()
        for each in self._layers.values():
            latents = each.parameters().get("latents")
            if latents is not None and latents.grad is not None:
                latents.sub_(latents.grad.sign(), alpha=rate * 2 * ROUNDING_REACH / self.steps)
                latents.grad = None
            each.clamp_()

    def _by_adam(self) -> Iterator[torch.Tensor]:
        """Scales and zero points that are trained."""
        for each in self._layers.values():
            for name, leaf in each.parameters().items():
                if name != "latents" and leaf.requires_grad:
                    yield leaf


@dataclass(slots=True)
class Polish:
    """A segment of a variant, as it is tuned.

    Where roundings are trained, scales and the like are trained beside them, and alone where that was no better.

    Args:
        module: the segment, loaded; what it holds does not change.
        weights: its solved layers by the names of their weights in it.
        floats: float parameters that are trained, by their names in it.
        options: of the tuning.
        examples: two at least.
        origins: the float weights that the layers stand for, by the same names.
        others: what stands in for further parameters meanwhile, as where a transform made others of them.
    """

    module: nn.Module
    weights: Mapping[str, QuantizedWeight]
    floats: Mapping[str, torch.Tensor]
    options: TuneOptions
    examples: Sequence[Example]
    origins: Mapping[str, torch.Tensor]
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def run(self) -> Tuned | None:
        """Train, and keep what the held-out examples like best; None where there is nothing to train."""
        held, train = divided(self.examples, self.options.held_out)
        best, before, steps, notes = _Best(self._judged(held, self._stored(self.weights, self.floats))), 0.0, 0, set()
        if not math.isfinite(best.loss):
            return Tuned(best.loss, best.loss, 0, note="its outputs are not finite: it was not tuned")
        before = best.loss
        trained = False
        for rounding in (True, False) if before > 0 else ():
            leaves = self._leaves(rounding)
            if not leaves:
                continue
            trained, best.misses = True, 0
            taken, note = self._train(leaves, best, held, train)
            steps += taken
            notes.add(note)
            if best.weights is not None:
                break
        if not trained and before > 0:
            return None
        added = sum(float(each.added()) for each in held) / len(held) or 1.0
        told = "; ".join(sorted(filter(None, notes))) if best.weights is not None else ""
        return Tuned(before / added, best.loss / added, steps, best.weights or {}, best.floats, told)

    def _leaves(self, rounding: bool) -> _Leaves | None:
        """What is trained; None where that is not wanted."""
        weights, floats = self.weights, self.floats
        if not rounding:
            return _Leaves(weights, floats, self.options) if self.options.train else None
        widest = max((each.codes.shape[1] for each in weights.values()), default=0)
        wanted = self.options.rounds(sum(each.batch.tokens for each in self.examples), widest)
        return _Leaves(weights, floats, self.options, self.origins) if wanted else None

    def _train(
        self, leaves: _Leaves, best: _Best, held: Sequence[Example], train: Sequence[Example]
    ) -> tuple[int, str]:
        """Train leaves; returns the steps taken, and why they ended early."""
        count, unit = leaves.steps, best.loss
        trials = {-(-count * number // TRIALS) for number in range(1, TRIALS + 1)}
        for step in range(1, count + 1):
            loss = self._step(leaves, train[(step - 1) % len(train)], unit, _rate(step, count))
            if not math.isfinite(loss):
                return step, f"the loss of step {step} was not finite: the best until then was kept"
            if step in trials:
                weights, floats = leaves.stored()
                best.see(self._judged(held, leaves.tensors() | self._stored(weights, floats)), weights, floats)
                if not leaves.rounds and best.misses >= self.options.patience and step < count:
                    return step, "the held-out rows saw no gain any more"
        return count, ""

    @torch.enable_grad()
    def _step(self, leaves: _Leaves, example: Example, unit: float, rate: float) -> float:
        """Train on one example; returns its loss, in units of that of the beginning."""
        loss = self._error(example, leaves.tensors()) / unit
        found = loss.item()
        if math.isfinite(found):
            torch.autograd.backward(loss)
            leaves.move(rate)
        return found

    def _stored(
        self, weights: Mapping[str, QuantizedWeight], floats: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """What stands in for parameters where so much of them is stored."""
        return {**{name: _decoded(each) for name, each in weights.items()}, **floats}

    @torch.no_grad()
    def _judged(self, held: Sequence[Example], tensors: Mapping[str, torch.Tensor]) -> float:
        """The mean error of held-out examples, with tensors in the places of parameters."""
        return sum(float(self._error(each, tensors)) for each in held) / len(held)

    def _error(self, example: Example, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        own = dict(self.module.named_parameters())
        cast = {name: each.to(own[name].dtype) for name, each in {**self.others, **tensors}.items()}
        return example.error(output_of(functional_call(self.module, cast, *example.arguments())))


def _decoded(weight: QuantizedWeight) -> torch.Tensor:
    return weight.dequantize(torch.float32)


def _rate(step: int, count: int) -> float:
    """The share of the learning rate at a step: it rises for some steps and falls to nothing."""
    return min(1.0, step / WARM_UP) * (1 - (step - 1) / count)


def divided(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Those that are held out, evenly spaced and at least one, and those to train on, at least one."""
    count = min(max(1, round(share * len(examples))), len(examples) - 1)
    places = {(2 * number + 1) * len(examples) // (2 * count) for number in range(count)}
    held = [each for place, each in enumerate(examples) if place in places]
    return held, [each for place, each in enumerate(examples) if place not in places]
