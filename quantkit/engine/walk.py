"""The walk: segment by segment, gather the statistics of every input, solve, go on with the result.

Within a segment the layers that share an input form a group. In a quantized feed (``inputs: quantized``) all
passes pause before the first layer of a group; when every pass stands there or beyond, the statistics are
complete, the group is solved, its weights are replaced, and the same passes go on with them: true
sequential calibration in one forward pass. Where the activations of all batches inside a segment would not
fit in memory, the segment is run anew for each group instead, one batch at a time. In a float feed nothing
is replaced and nothing pauses.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from quantkit.engine.batches import Batch
from quantkit.engine.groups import PreHook, call_order, hooked, shared_inputs
from quantkit.engine.passes import AtEnd, AtGroup, AtSegment, Pass, pause, running_batch
from quantkit.engine.skeleton import Segment, Skeleton, WeightReader, linear_modules
from quantkit.engine.statistics import Gatherer
from quantkit.engine.tasks import Task, solve_group
from quantkit.methods.base import Statistic

Feed = Literal["quantized", "float"]
Strategy = Literal["one-pass", "recompute"]


@dataclass(frozen=True, slots=True)
class WalkSettings:
    """How a walk computes.

    Attributes:
        device: where segments are loaded and solved.
        dtype: of weights and activations in the forward passes; layers are solved in float32.
        feed: what a layer is calibrated on, see :class:`quantkit.recipe.CalibrationSpec`.
        strategy: ``one-pass`` keeps the activations of all batches alive at a pause, ``recompute`` those of one.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    feed: Feed = "quantized"
    strategy: Strategy = "one-pass"


@dataclass(slots=True)
class _Group:
    """Layers of a segment that share an input, the one that is called first at the head."""

    linears: dict[str, nn.Linear]
    gatherer: Gatherer
    solved: bool = False

    @property
    def leader(self) -> nn.Linear:
        return next(iter(self.linears.values()))


class _Enough(Exception):  # noqa: N818 - not an error: it ends a trial run
    """A trial run of a segment has shown what it was run for."""


@dataclass(slots=True)
class Walk:
    """One walk over a model.

    Args:
        skeleton: the model.
        reader: where weights come from.
        batches: the calibration tokens, on the device of the walk.
        tasks: what is solved; a quantized feed is the stream of one variant and takes one task.
        settings: how.
        on_segment: called with the number of finished segments and how many there are.
    """

    skeleton: Skeleton
    reader: WeightReader
    batches: Sequence[Batch]
    tasks: Sequence[Task]
    settings: WalkSettings
    on_segment: Callable[[int, int], None] = lambda _done, _total: None
    _passes: list[Pass] = field(default_factory=list)

    def run(self) -> None:
        """Walk through all segments.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
            QuantizationError: a layer cannot be solved.
        """
        if self.settings.feed == "quantized" and len(self.tasks) > 1:
            raise ValueError("a quantized feed is the stream of one variant: give one task per walk")
        segments = self._wanted_segments()
        calibrated = bool(self._needs()) and bool(self.batches)
        with torch.no_grad(), ExitStack() as cleanup:
            cleanup.callback(self._stop_passes)
            if calibrated:
                self._start_passes(segments, cleanup)
            for index, segment in enumerate(segments):
                self.skeleton.load(segment, self.reader, self.settings.device, self.settings.dtype)
                if calibrated:
                    self._calibrate(segment, last=index == len(segments) - 1)
                else:
                    self._solve_uncalibrated(segment)
                self.skeleton.unload(segment)
                for task in self.tasks:
                    task.sink.segment_done(segment.prefix)
                self.on_segment(index + 1, len(segments))

    def _wanted_segments(self) -> list[Segment]:
        head = self.skeleton.head
        wants_head = head is not None and any(head.prefix in task.schemes for task in self.tasks)
        return [*self.skeleton.segments, *([head] if head is not None and wants_head else [])]

    def _needs(self) -> frozenset[Statistic]:
        return frozenset[Statistic]().union(*(task.method.needs for task in self.tasks))

    def _start_passes(self, segments: Sequence[Segment], cleanup: ExitStack) -> None:
        """Run every pass up to the first segment."""
        self.skeleton.load_frame(self.reader, self.settings.device, self.settings.dtype)
        for index, segment in enumerate(segments):
            hook = segment.module.register_forward_pre_hook(_pause_before(index), with_kwargs=True)
            cleanup.callback(hook.remove)
        end = segments[-1].module.register_forward_hook(lambda *_: pause(AtEnd()))
        cleanup.callback(end.remove)
        self._passes = [Pass(self.skeleton.model, batch) for batch in self.batches]
        self._advance()

    def _stop_passes(self) -> None:
        for each in self._passes:
            each.stop()

    def _advance(self) -> None:
        for each in self._passes:
            each.resume()

    def _calibrate(self, segment: Segment, last: bool) -> None:
        """Solve a segment before which every pass stands, and bring them to the next."""
        if isinstance(segment.module, nn.Linear):
            self._calibrate_linear(segment, last)
            return
        groups = self._groups(segment)
        if self.settings.feed == "float":
            with self._gathering(groups, pausing=False):
                self._advance()
            for group in groups:
                self._solve(group)
        elif self.settings.strategy == "one-pass":
            with self._gathering(groups, pausing=True):
                self._one_pass(groups, last)
        else:
            self._recompute(segment, groups)
            if not last:
                self._advance()

    def _calibrate_linear(self, segment: Segment, last: bool) -> None:
        """Solve a segment that is one layer, as the head is: what the passes stand before it with is its input."""
        for name, module in self._wanted(segment).items():
            group = _Group({name: module}, Gatherer(self._needs()))
            for each in self._passes:
                group.gatherer.add(_standing(each, segment).args[0], each.batch)
            self._solve(group)
        if not last:
            self._advance()

    def _solve_uncalibrated(self, segment: Segment) -> None:
        for name, module in self._wanted(segment).items():
            self._solve(_Group({name: module}, Gatherer(frozenset())))

    def _groups(self, segment: Segment) -> list[_Group]:
        """The groups of a segment in the order of their calls, found by trying batches until all layers were seen."""
        wanted = self._wanted(segment)
        smallest_first = sorted(self._passes, key=lambda each: each.batch.token_ids.numel())
        runs = (shared_inputs(wanted, partial(self._try, segment, each)) for each in smallest_first)
        order = call_order(list(wanted), runs) if wanted else []
        return [_Group({name: wanted[name] for name in names}, Gatherer(self._needs())) for names in order]

    def _wanted(self, segment: Segment) -> dict[str, nn.Linear]:
        """The layers of a segment that a task quantizes."""
        return {name: module for name, module in linear_modules(segment) if any(name in t.schemes for t in self.tasks)}

    def _try(self, segment: Segment, each: Pass) -> None:
        """Run a segment with the arguments of a pass that stands before it, which stays where it is."""
        place = _standing(each, segment)
        with suppress(_Enough):
            segment.module(*place.args, **place.kwargs)

    @contextmanager
    def _gathering(self, groups: Sequence[_Group], pausing: bool) -> Iterator[None]:
        def gather(index: int, group: _Group) -> PreHook:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                if not group.solved:
                    group.gatherer.add(args[0], running_batch())
                    if pausing:
                        pause(AtGroup(index))

            return hook

        with hooked([(group.leader, gather(index, group)) for index, group in enumerate(groups)]):
            yield

    def _one_pass(self, groups: Sequence[_Group], last: bool) -> None:
        """Solve the groups in their order, each when all passes stand at it or beyond."""
        self._advance()
        for index, group in enumerate(groups):
            self._solve(group)
            if last and index == len(groups) - 1:
                self._stop_passes()
            for each in self._passes:
                if each.place == AtGroup(index):
                    each.resume()

    def _recompute(self, segment: Segment, groups: Sequence[_Group]) -> None:
        """Run the segment anew for each group, one batch at a time, with all earlier groups solved."""
        for group in groups:
            for each in self._passes:

                def gather(_: nn.Module, args: tuple[Any, ...], group: _Group = group, each: Pass = each) -> None:
                    group.gatherer.add(args[0], each.batch)
                    raise _Enough

                with hooked([(group.leader, gather)]):
                    self._try(segment, each)
            self._solve(group)

    def _solve(self, group: _Group) -> None:
        statistics = group.gatherer.result()
        weights = {name: self._original(name) for name in group.linears}
        for task in self.tasks:
            with _no_garbage_collection():
                solved = solve_group(task, weights, statistics)
            if self.settings.feed == "quantized":
                for name, weight in solved.items():
                    group.linears[name].weight.data = weight.to(self.settings.dtype)
        group.solved = True

    def _original(self, name: str) -> torch.Tensor:
        """The weight of a layer as it is in the checkpoint, in float32 whatever the passes compute in."""
        stored = self.skeleton.stored_name(f"{name}.weight", self.reader)
        return self.reader.read(stored).to(self.settings.device, torch.float32)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Solving makes a view of every column and no cycles: looking for garbage among them costs a tenth of it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _standing(each: Pass, segment: Segment) -> AtSegment:
    """Where a pass stands, with the arguments that it would call the segment with."""
    if not isinstance(each.place, AtSegment):
        raise RuntimeError(f"a pass stands at {each.place}, not before {segment.prefix}")
    return each.place


def _pause_before(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pause(AtSegment(index, args, kwargs))

    return hook
