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
from pathlib import Path
from typing import Literal

import torch

from quantkit.engine.batches import Batch
from quantkit.engine.kept_calls import on_cpu
from quantkit.engine.reverse import ReverseWalk, standing_in
from quantkit.engine.segment import Segment, WeightReader
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import QuantkitError
from quantkit.quantization.memory_use import SPARE_MEMORY
from quantkit.recovery.descent import Descent, NotFiniteError
from quantkit.recovery.losses import divergence, relative_error
from quantkit.recovery.parts import Part
from quantkit.recovery.saved import read_state, save_state, write_tensors
from quantkit.recovery.schedule import Schedule
from quantkit.recovery.targets import Targets
from quantkit.recovery.verdicts import Verdicts
from quantkit.system.free_memory import free_bytes, give_back
from quantkit.system.memory_bounds import NO_BOUNDS, MemoryBounds
from quantkit.system.shutdown import heed

FRAME = ""
"""Under what the parts are listed that are in no segment, by their names in the whole model."""


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
        bounds: what may be taken of memory; no byte depends on it.
    """

    skeleton: Skeleton
    reader: WeightReader
    parts: Mapping[str, Sequence[Part]]
    targets: Targets
    schedule: Schedule
    folder: Path
    on_step: Callable[[int, int], None] = lambda _done, _total: None
    bounds: MemoryBounds = NO_BOUNDS
    _walk: ReverseWalk = field(init=False)
    _descent: Descent = field(init=False)
    _verdicts: Verdicts = field(init=False, default_factory=Verdicts)
    _rate: float = field(init=False, default=0.0)
    _as: Literal["trained", "rounded", "given"] = field(init=False, default="trained")

    def run(self) -> Trained:
        """Train, from the beginning or from where an earlier run was.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
            QuantizationError: the model's code fails on the rows.
            OutputError: the state cannot be written.
            Terminated: somebody asked to stop; the state is saved.
        """
        targets, schedule = self.targets, self.schedule
        lengths = [len(row) for row in targets.rows]
        held, rows = schedule.divided(len(lengths))
        plan = schedule.plan(rows, lengths)
        self._descent = Descent(self.parts, schedule.rates, schedule.optimizer)
        self._walk = ReverseWalk(
            self.skeleton, self.reader, targets.device, targets.dtype, self._loaded, on_cpu, holds=self._holding()
        )
        with self._walk:
            done = self._take_up()
            if not self._verdicts.history:
                self._judge(0, held)
            while done < len(plan) and self._verdicts.go_on:
                done += self._moves(plan[done], done)
                give_back()
                self.on_step(done, len(plan))
                if done in schedule.judged() and self._verdicts.go_on:
                    self._judge(done, held)
                    self._save(done)
                heed()
        return self._trained(done, sum(lengths[place] for step in plan[:done] for place in step))

    def _trained(self, steps: int, tokens: int) -> Trained:
        found = self._verdicts
        before, after = found.history[0][1], min(each for _, each in found.history)
        best = None if found.best is None else self.folder / found.best
        if best is None:
            found.notes.append("nothing was better on the held-out rows than what there was: it stays as it is")
        return Trained(before, after, best, steps, tokens, tuple(found.history), tuple(found.notes))

    def _holding(self) -> Callable[[], bool]:
        """Whether a segment may hold its graph: while as much is free as is to be left of the memory that is now."""
        device = self.targets.device
        left = (1 - SPARE_MEMORY) * free_bytes(device, self.bounds)
        return lambda: free_bytes(device, self.bounds) > left

    # Segments and their leaves

    @contextmanager
    def _loaded(self, segment: Segment, for_gradients: bool) -> Iterator[None]:
        targets = self.targets
        self.skeleton.load(segment, self.reader, targets.device, targets.dtype)
        try:
            with standing_in(segment.module, self._stand_ins(segment.prefix, with_graph=for_gradients)):
                yield
            if for_gradients:
                self._descent.move(segment.prefix, self._rate)
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

    # Steps

    def _moves(self, rows: Sequence[int], number: int) -> int:
        """A step; returns 1, or 0 where it could not be made, which a note tells."""
        self._rate = self.schedule.rate(number)
        try:
            self._step(rows)
        except NotFiniteError:
            self._verdicts.end(number + 1, "the loss is not finite")
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
                raise NotFiniteError
            return value

        self._walk.on_output = self._between(total)
        try:
            with standing_in(self.skeleton.model, self._stand_ins(FRAME, with_graph=True)):
                self._walk.run(batches, loss)
        finally:
            self._walk.on_output = None
        self._descent.move(FRAME, self._rate)

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

    def _judge(self, done: int, held: Sequence[int]) -> None:
        """Let the held-out rows judge what would be stored now, and keep it if it is the best so far."""
        self._as = "rounded" if done else "given"
        try:
            found = self._divergence(held)
        except QuantkitError as error:
            if not self._verdicts.history:
                raise
            self._verdicts.end(done, error.problem)
            return
        finally:
            self._as = "trained"
        if self._verdicts.add(done, found):
            parts = [part for parts in self.parts.values() for part in parts]
            kept = {f"{part.name}|{name}": each for part in parts for name, each in part.stored().items()}
            write_tensors(self.folder / str(self._verdicts.best), kept)

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

    # The state

    def _save(self, done: int) -> None:
        tensors, numbers = self._descent.state()
        found = self._verdicts
        told = {"numbers": numbers, "norms": self._descent.norms, "history": found.history, "best": found.best}
        save_state(self.folder, done, tensors, {**told, "notes": found.notes})

    def _take_up(self) -> int:
        """Go on from what an earlier run saved; returns the steps that it made."""
        saved = read_state(self.folder)
        if saved is None:
            return 0
        tensors, told = saved
        self._descent.take_up(tensors, told["numbers"])
        self._descent.norms = dict(told["norms"])
        self._verdicts = Verdicts([(step, kl) for step, kl in told["history"]], told["best"], list(told["notes"]))
        return int(told["step"])
