"""The training: a model is brought closer to what the float model says of every token, with one block in memory.

A step runs some rows forward and backward (:mod:`quantkit.engine.reverse`). When the gradients of a block are there its
optimizer moves its leaves, and they are let go. Now and then the rows that are held out judge what would be stored of
the leaves, and the best so far is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from quantkit.engine.batches import Batch
from quantkit.engine.kept_calls import on_cpu
from quantkit.engine.reverse import ReverseWalk, standing_in
from quantkit.engine.segment import Segment, WeightReader
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import QuantizationError, QuantkitError
from quantkit.recovery.parts import Part
from quantkit.recovery.saved import read_state, save_state, write_tensors
from quantkit.recovery.targets import Targets
from quantkit.system.free_memory import give_back
from quantkit.system.shutdown import heed

FRAME = ""
"""Under what the parts are listed that are in no segment, by their names in the whole model."""
CODES, SIGNS = "codes", "signs"
"""The kind of leaves that are the codes of weights, and the optimizer that moves these by signs and others by Adam."""
BETAS = (0.9, 0.99)
EPSILON = 1e-16
"""Of Adam: gradients of single codes are tiny."""
SUDDEN = 2.0
"""How many times its usual norm the gradient of a segment may have; what is beyond is cut."""
MEMORY = 0.9
"""Share of a segment's usual norm that is kept at each step."""
RISES = 3
"""How often in a row the held-out rows may see the loss rise before the training ends."""


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
        optimizer: of codes :data:`SIGNS`, or see :func:`optimizer`.
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


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a training.

    Attributes:
        before: mean divergence on the held-out rows before it, in nats a token.
        after: of the best that was found; never above ``before``.
        best: file with what is stored of every part, as ``PART|NAME``; None where nothing was better.
        steps: how many were made.
        tokens: on which it was trained.
        history: the steps and divergences at which it was judged.
        notes: what the user should know.
    """

    before: float
    after: float
    best: Path | None
    steps: int
    tokens: int
    history: tuple[tuple[int, float], ...]
    notes: tuple[str, ...]


class _NotFiniteError(Exception):
    """A loss or a gradient is not finite."""


@dataclass(slots=True)
class Training:
    """Trains parts of a model.

    Args:
        skeleton: the model.
        reader: its weights, where nothing stands in for them.
        parts: what is trained, by the prefixes of segments, see :data:`FRAME`.
        targets: the float model, for the same rows; it is open.
        schedule: how.
        folder: where the state is kept; what an earlier run left there is its own.
        on_step: called with the number of steps done, and of all.
    """

    skeleton: Skeleton
    reader: WeightReader
    parts: Mapping[str, Sequence[Part]]
    targets: Targets
    schedule: Schedule
    folder: Path
    on_step: Callable[[int, int], None] = lambda _done, _total: None
    _walk: ReverseWalk = field(init=False)
    _optimizers: dict[str, torch.optim.Optimizer] = field(init=False, default_factory=dict)
    _norms: dict[str, float] = field(init=False, default_factory=dict)
    _history: list[tuple[int, float]] = field(init=False, default_factory=list)
    _best: str | None = field(init=False, default=None)
    _rate: float = field(init=False, default=0.0)
    _as: Literal["trained", "rounded", "given"] = field(init=False, default="trained")
    _notes: list[str] = field(init=False, default_factory=list)

    def run(self) -> Trained:
        """Train, from the beginning or from where an earlier run was.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
            QuantizationError: the model's code fails on the rows.
            OutputError: the state cannot be written.
            Terminated: somebody asked to stop; the state is saved.
        """
        targets = self.targets
        held, rows = self._divided()
        plan = self._plan(rows)
        for prefix, parts in self.parts.items():
            self._optimizers |= {prefix: made} if (made := self._optimizer(parts)) is not None else {}
        self._walk = ReverseWalk(self.skeleton, self.reader, targets.device, targets.dtype, self._loaded, on_cpu)
        with self._walk:
            done = self._take_up()
            if not self._history:
                self._judge(0, held)
            due = {round(len(plan) * number / self.schedule.evaluations) for number in range(1, len(plan) + 1)}
            while done < len(plan) and self._goes_on():
                done += self._moves(plan[done], done)
                give_back()
                self.on_step(done, len(plan))
                if done in due and self._goes_on():
                    self._judge(done, held)
                    self._save(done)
                heed()
        return self._trained(done, sum(len(targets.rows[place]) for step in plan[:done] for place in step))

    def _trained(self, steps: int, tokens: int) -> Trained:
        before, after = self._history[0][1], min(each for _, each in self._history)
        best = None if self._best is None else self.folder / self._best
        if best is None:
            self._notes.append("nothing was better on the held-out rows than what there was: it stays as it is")
        return Trained(before, after, best, steps, tokens, tuple(self._history), tuple(self._notes))

    # Rows

    def _divided(self) -> tuple[list[int], list[int]]:
        """The rows that judge, and those that train.

        Raises:
            QuantizationError: there are too few.
        """
        count = len(self.targets.rows)
        if count < 4:
            raise QuantizationError(f"{count} rows are too few to train on, as 2 are held out", "give more records")
        order = self._order(count, 0)
        held = min(max(2, round(self.schedule.held_out * count)), count - 2)
        return sorted(order[:held]), sorted(order[held:])

    def _order(self, count: int, epoch: int) -> list[int]:
        draw = torch.Generator().manual_seed(self.schedule.seed * 1_000_003 + epoch)
        found: list[int] = torch.randperm(count, generator=draw).tolist()
        return found

    def _plan(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows of each step: all of them in an order of their own, again and again."""
        found: list[list[int]] = []
        order: list[int] = []
        epoch = 0
        for _ in range(self.schedule.steps):
            step: list[int] = []
            tokens = 0
            while tokens < self.schedule.batch_tokens and len(step) < len(rows):
                if not order:
                    epoch += 1
                    order = [rows[place] for place in self._order(len(rows), epoch)]
                step.append(order.pop())
                tokens += len(self.targets.rows[step[-1]])
            found.append(step)
        return found

    # Segments and their leaves

    @contextmanager
    def _loaded(self, segment: Segment, for_gradients: bool) -> Iterator[None]:
        targets = self.targets
        self.skeleton.load(segment, self.reader, targets.device, targets.dtype)
        try:
            with standing_in(segment.module, self._stand_ins(segment.prefix, with_graph=for_gradients)):
                yield
            if for_gradients:
                self._descend(segment.prefix)
        finally:
            self.skeleton.unload(segment)

    def _stand_ins(self, prefix: str, *, with_graph: bool) -> dict[str, torch.Tensor]:
        """By the names of parameters what stands in for those of a segment."""
        with torch.set_grad_enabled(with_graph):
            found = [self._of(part) for part in self.parts.get(prefix, ())]
            return {name: each.to(self.targets.dtype) for tensors in found for name, each in tensors.items()}

    def _of(self, part: Part) -> Mapping[str, torch.Tensor]:
        """What stands in for the parameters of a part: as it is trained, as it would be stored, or as it was."""
        if self._as == "trained":
            return part.standing_in()
        return part.rounded() if self._as == "rounded" else part.given()

    def _optimizer(self, parts: Sequence[Part]) -> torch.optim.Optimizer | None:
        """What moves the leaves of a segment; None where there are none."""
        groups: dict[str, list[torch.Tensor]] = {}
        for part in parts:
            for kind, leaf in part.leaves().values():
                groups.setdefault(kind, []).append(leaf)
        made: list[dict[str, Any]] = [
            {"params": leaves, "kind": kind, "lr": 0.0} for kind, leaves in groups.items() if not self._by_signs(kind)
        ]
        return optimizer(self.schedule.optimizer, made) if made else None

    def _by_signs(self, kind: str) -> bool:
        """Whether leaves of a kind are moved by the signs of their gradients, without any memory of earlier ones."""
        return kind == CODES and self.schedule.optimizer == SIGNS

    def _descend(self, prefix: str) -> None:
        """Move the leaves of a segment along their gradients, which are let go."""
        by_kind: dict[str, list[torch.Tensor]] = {}
        for part in self.parts.get(prefix, ()):
            for kind, leaf in part.leaves().values():
                if leaf.grad is not None:
                    by_kind.setdefault(kind, []).append(leaf)
        for kind, leaves in by_kind.items():
            self._calm(f"{prefix}|{kind}", leaves)
            if self._by_signs(kind):
                for leaf in leaves:
                    with torch.no_grad():
                        leaf.sub_(_gradient(leaf).sign_(), alpha=self.schedule.rates[kind] * self._rate)
                    leaf.grad = None
        found = self._optimizers.get(prefix)
        if found is not None:
            for group in found.param_groups:
                group["lr"] = self.schedule.rates[group["kind"]] * self._rate
            found.step()
            found.zero_grad(set_to_none=True)
        for part in self.parts.get(prefix, ()):
            part.clamp_()

    def _calm(self, name: str, leaves: Sequence[torch.Tensor]) -> None:
        """Cut gradients that are much larger than they usually are.

        Raises:
            _NotFiniteError: they are not finite.
        """
        norm = float(nn.utils.get_total_norm([_gradient(leaf) for leaf in leaves]))
        if not math.isfinite(norm):
            raise _NotFiniteError
        usual = self._norms.get(name, norm)
        most = SUDDEN * usual
        if norm > most:
            for leaf in leaves:
                _gradient(leaf).mul_(most / norm)
        self._norms[name] = MEMORY * usual + (1 - MEMORY) * min(norm, most)

    # Steps

    def _moves(self, rows: Sequence[int], number: int) -> int:
        """A step; returns 1, or 0 where it could not be made, which a note tells."""
        ramp = max(1.0, self.schedule.warmup * self.schedule.steps)
        falling = 0.5 * (1 + math.cos(math.pi * number / self.schedule.steps))
        self._rate = min(1.0, (number + 1) / ramp) * falling
        try:
            self._step(rows)
        except _NotFiniteError:
            self._notes.append(f"step {number + 1}: the loss is not finite; the training ends with the best so far")
            return 0
        return 1

    def _step(self, rows: Sequence[int]) -> None:
        batches = self.targets.batches(rows)
        total = sum(batch.tokens for batch in batches)
        hidden: list[torch.Tensor] = []
        seen: list[Batch] = []

        def loss(logits: torch.Tensor, batch: Batch, places: torch.Tensor) -> torch.Tensor:
            if not seen or seen[-1] is not batch:
                seen.append(batch)
                hidden[:] = [self.targets.hidden(batch)]
            value = divergence(self.targets.log_probabilities(hidden[0][places]), logits) / total
            if not math.isfinite(float(value.detach())):
                raise _NotFiniteError
            return value

        self._walk.on_output = self._between(total)
        try:
            with standing_in(self.skeleton.model, self._stand_ins(FRAME, with_graph=True)):
                self._walk.run(batches, loss)
        finally:
            self._walk.on_output = None
        self._descend(FRAME)

    def _between(self, total: int) -> Callable[[int, torch.Tensor], None]:
        """What is called with the outputs of segments: it runs the gradient of their errors back.

        Args:
            total: tokens of the step.
        """
        points = self.targets.points if self.schedule.hidden else frozenset()
        weight = self.schedule.hidden / (total * max(len(points), 1))

        def seen(index: int, output: torch.Tensor) -> None:
            batch = self._walk.batch
            if batch is not None and index in points:
                found, _ = batch.tokens_of(output.flatten(0, 1))
                torch.autograd.backward(weight * relative_error(self.targets.hidden(batch, index), found))

        return seen

    # Judging

    def _goes_on(self) -> bool:
        """Whether nothing has ended the training before its last step."""
        return not self._notes

    def _judge(self, done: int, held: Sequence[int]) -> None:
        """Let the held-out rows judge what would be stored now, and keep it if it is the best so far."""
        self._as = "rounded" if done else "given"
        try:
            found = self._divergence(held)
        except QuantkitError as error:
            if not self._history:
                raise
            self._notes.append(f"step {done}: {error.problem}; the training ends with the best so far")
            return
        finally:
            self._as = "trained"
        before = [each for _, each in self._history]
        if not math.isfinite(found):
            if not before:
                raise QuantizationError("the quantized model's divergence is not finite", "export it again")
            self._notes.append(f"step {done}: the loss is not finite; the training ends with the best so far")
            return
        self._history.append((done, found))
        if before and found < min(before):
            self._best = f"best-{done}.safetensors"
            kept = {f"{part.name}|{name}": each for part in self._all_parts() for name, each in part.stored().items()}
            write_tensors(self.folder / self._best, kept)
        last = [each for _, each in self._history[-RISES - 1 :]]
        if len(last) > RISES and all(one < other for one, other in pairwise(last)):
            self._notes.append(f"step {done}: held-out rows see it get worse; the training ends with the best so far")

    def _divergence(self, held: Sequence[int]) -> float:
        """The mean over the tokens of some rows, in nats."""
        targets, head, total = self.targets, self.skeleton.head, 0.0
        batches = targets.batches(held)
        with ExitStack() as ends, torch.no_grad():
            ends.enter_context(standing_in(self.skeleton.model, self._stand_ins(FRAME, with_graph=False)))
            found = self._walk.hidden(batches)
            if head is not None:
                ends.enter_context(self._loaded(head, False))
            for batch, ours in zip(batches, found, strict=True):
                theirs = targets.hidden(batch)
                size = max(1, (1 << 24) // self._walk.vocabulary)
                for one, other in zip(torch.split(theirs, size), torch.split(ours, size), strict=True):
                    total += float(divergence(targets.log_probabilities(one), self._walk.logits(other)))
        return total / sum(batch.tokens for batch in batches)

    def _all_parts(self) -> Iterator[Part]:
        for parts in self.parts.values():
            yield from parts

    # The state

    def _named_leaves(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Every leaf with its name and the prefix of its segment."""
        for prefix, parts in self.parts.items():
            for part in parts:
                for name, (_, leaf) in part.leaves().items():
                    yield f"{part.name}|{name}", prefix, leaf

    def _save(self, done: int) -> None:
        tensors: dict[str, torch.Tensor] = {}
        numbers: dict[str, Any] = {}
        for name, prefix, leaf in self._named_leaves():
            tensors[name] = leaf
            found = self._optimizers.get(prefix)
            for key, value in found.state.get(leaf, {}).items() if found is not None else ():
                kept = tensors if isinstance(value, torch.Tensor) else numbers
                kept[f"{name}|{key}"] = value
        told = {"numbers": numbers, "norms": self._norms, "history": self._history, "best": self._best}
        save_state(self.folder, done, tensors, {**told, "notes": self._notes})

    def _take_up(self) -> int:
        """Go on from what an earlier run saved; returns the steps that it made."""
        saved = read_state(self.folder)
        if saved is None:
            return 0
        tensors, told = saved
        for name, prefix, leaf in self._named_leaves():
            with torch.no_grad():
                leaf.copy_(tensors[name])
            start = f"{name}|"
            state = {key.removeprefix(start): each for key, each in tensors.items() if key.startswith(start)}
            state = {key: each if key == "step" else each.to(leaf.device) for key, each in state.items()}
            numbers = {key.removeprefix(start): each for key, each in told["numbers"].items() if key.startswith(start)}
            if state or numbers:
                self._optimizers[prefix].state[leaf] = {**state, **numbers}
        self._norms = dict(told["norms"])
        self._history = [(step, kl) for step, kl in told["history"]]
        self._best, self._notes = told["best"], list(told["notes"])
        return int(told["step"])


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    """The gradient of a leaf that has one."""
    if leaf.grad is None:
        raise ValueError("a leaf without a gradient")
    return leaf.grad


class _Divergence(torch.autograd.Function):
    """The divergence, with its gradient made at once: what autograd keeps and passes over is several times as much."""

    @staticmethod
    def forward(context: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ours, theirs = logits.float().log_softmax(-1), target.exp()
        value = (target - ours).mul_(theirs).flatten().sum()
        if context.needs_input_grad[0]:
            context.save_for_backward(ours.exp_().sub_(theirs).to(logits.dtype))
        return value

    @staticmethod
    def backward(context: Any, *given: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = context.saved_tensors
        return gradient * given[0], None


def divergence(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL divergence summed over tokens, in nats: of the distributions that logits tell from those of the target.

    Args:
        target: log-probabilities, float32 ``[tokens, vocabulary]``.
        logits: ``[tokens, vocabulary]``.
    """
    value: torch.Tensor = _Divergence.apply(logits, target)  # type: ignore[no-untyped-call]  # torch does not type it
    return value


def relative_error(target: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Squared errors of hidden states, each relative to the square of what it should be, summed over tokens, 0-d.

    Args:
        target: ``[tokens, width]``.
        found: likewise.
    """
    wanted = target.float()
    size = wanted.square().sum(-1)
    least = torch.clamp(size.mean() * 1e-6, min=torch.finfo(torch.float32).tiny)
    return ((found.float() - wanted).square().sum(-1) / torch.maximum(size, least)).sum()


def optimizer(name: str, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer by its name in options.

    Args:
        name: one of bitsandbytes, ``adam8bit`` or ``paged_adam8bit``; any other means Adam.
        groups: of leaves.

    Raises:
        QuantizationError: bitsandbytes is not installed.
    """
    if name in (SIGNS, "adam"):
        on_cpu_only = all(leaf.device.type == "cpu" for group in groups for leaf in group["params"])
        return torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=on_cpu_only, foreach=False)
    try:
        import bitsandbytes
    except ImportError as error:
        raise QuantizationError(
            f"optimizer {name} is one of bitsandbytes, which is not installed", "use adam, or pip install bitsandbytes"
        ) from error
    kinds: Any = bitsandbytes.optim  # its classes are not in its type hints
    kind = kinds.PagedAdam8bit if name == "paged_adam8bit" else kinds.Adam8bit
    found: torch.optim.Optimizer = kind(groups, lr=1e-3, betas=BETAS, eps=EPSILON)
    return found
