"""The walk: segment by segment, gather the statistics of every input, solve, go on with the result.

Within a segment the layers that share an input form a group. In a quantized feed (``inputs: quantized``) all
passes pause before the first layer of a group; when every pass stands there or beyond, the statistics are
complete, the group is solved, its weights are replaced, and the same passes go on with them: true
sequential calibration in one forward pass. Where the activations of all batches inside a segment would not
fit in memory, the segment is run anew for each group instead, one batch at a time. In a float feed nothing
is replaced and nothing pauses, so that any number of variants is solved from the same statistics.

The input embedding, where a task quantizes it, comes before the first segment and is solved from its weight alone: what
it is read with are token ids.

A method that scales inputs is asked for its factors before the first layer of a segment is solved, from the
statistics of the segment as it is; in a quantized feed they are gathered by one more run of it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from quantkit.engine.batches import Batch
from quantkit.engine.folds import Fold
from quantkit.engine.groups import Enough, PreHook, call_order, hooked, shared_inputs
from quantkit.engine.passes import AtEnd, AtGroup, AtSegment, Pass, pause, running_batch
from quantkit.engine.rescaling import Originals, Rescaler
from quantkit.engine.skeleton import Segment, Skeleton, WeightReader, linear_modules
from quantkit.engine.statistics import Gatherer
from quantkit.engine.tasks import Task, solve_group
from quantkit.methods.base import InputStatistics, Statistic

T = TypeVar("T")
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

    Attributes:
        failures: by name the tasks that failed and were dropped while others went on.
        seconds: by name what each task's own work took; the rest of the walk is shared.
    """

    skeleton: Skeleton
    reader: WeightReader
    batches: Sequence[Batch]
    tasks: Sequence[Task]
    settings: WalkSettings
    on_segment: Callable[[int, int], None] = lambda _done, _total: None
    failures: dict[str, Exception] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _passes: list[Pass] = field(default_factory=list)
    _originals: Originals = field(init=False)
    _rescaler: Rescaler = field(init=False)

    def __post_init__(self) -> None:
        self._originals = Originals(self.skeleton, self.reader, self.settings.device)
        self._rescaler = Rescaler(self._originals)

    def run(self) -> None:
        """Walk through all segments.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
            QuantizationError: a layer cannot be solved, and no other task is left that can.
        """
        if self.settings.feed == "quantized" and len(self.tasks) > 1:
            raise ValueError("a quantized feed is the stream of one variant: give one task per walk")
        segments = self._wanted_segments()
        calibrated = bool(self._needs()) and bool(self.batches)
        with torch.no_grad(), ExitStack() as cleanup:
            cleanup.callback(self._stop_passes)
            if calibrated:
                self.skeleton.load_frame(self.reader, self.settings.device, self.settings.dtype)
            self._solve_embedding(live=calibrated)
            if calibrated:
                self._start_passes(segments, cleanup)
            for index, segment in enumerate(segments):
                self.skeleton.load(segment, self.reader, self.settings.device, self.settings.dtype)
                if calibrated:
                    self._calibrate(segment, last=index == len(segments) - 1)
                else:
                    self._solve_uncalibrated(segment)
                self.skeleton.unload(segment)
                for task in self._alive():
                    self._work(task, partial(task.sink.segment_done, segment.prefix))
                self.on_segment(index + 1, len(segments))

    def _alive(self) -> list[Task]:
        return [task for task in self.tasks if task.name not in self.failures]

    def _work(self, task: Task, work: Callable[[], T]) -> T | None:
        """Do a task's own work and time it; one that fails is dropped, so that it does not take the others down.

        Any error counts, as methods are plugins; the last one standing raises its own.
        """
        started = perf_counter()
        try:
            return work()
        except Exception as error:
            self.failures[task.name] = error
            if not self._alive():
                raise
            return None
        finally:
            self.seconds[task.name] = self.seconds.get(task.name, 0.0) + perf_counter() - started

    def _wanted_segments(self) -> list[Segment]:
        head = self.skeleton.head
        wants_head = head is not None and any(head.prefix in task.schemes for task in self.tasks)
        return [*self.skeleton.segments, *([head] if head is not None and wants_head else [])]

    def _needs(self) -> frozenset[Statistic]:
        return frozenset[Statistic]().union(*(task.method.needs for task in self.tasks))

    def _solve_embedding(self, live: bool) -> None:
        """Solve the input embedding for each task that wants it.

        Args:
            live: the passes will read it, so that it is loaded and in a quantized feed gives way to the result.
        """
        segment = self.skeleton.embedding
        wanting = [task for task in self.tasks if segment is not None and segment.prefix in task.schemes]
        if segment is None or not wanting:
            return
        if not live:
            self.skeleton.load(segment, self.reader, self.settings.device, self.settings.dtype)
            self.skeleton.unload(segment)
        name = segment.prefix
        weights = {name: self._originals.weight(name)}
        for task in wanting:
            solve = partial(solve_group, task, weights, InputStatistics(), embedding=True)
            with _no_garbage_collection():
                solved = self._work(task, solve)
            if solved is not None:
                self._work(task, partial(task.sink.segment_done, name))
            if solved is not None and live and self.settings.feed == "quantized":
                decoded = solved[name].dequantize(torch.float32)
                segment.module.get_parameter("weight").data = decoded.to(self.settings.dtype)

    def _start_passes(self, segments: Sequence[Segment], cleanup: ExitStack) -> None:
        """Run every pass up to the first segment."""
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
        scaling = [task for task in self._alive() if task.method.scales_inputs]
        folds = self._find_folds(segment) if scaling else []
        if self.settings.feed == "float":
            with self._gathering(groups, pausing=False):
                self._advance()
            known = _by_layer(groups)
            for task in scaling:
                self._work(task, partial(self._rescaler.choose, task, segment, folds, known))
            for group in groups:
                self._solve(group, known[next(iter(group.linears))])
        else:
            if folds:
                known = self._observe(segment, groups)
                self._work(scaling[0], partial(self._rescaler.choose, scaling[0], segment, folds, known))
                self._rescaler.apply(scaling[0], segment, self.settings.dtype)
            if self.settings.strategy == "one-pass":
                with self._gathering(groups, pausing=True):
                    self._one_pass(groups, last)
            else:
                self._recompute(segment, groups)
                if not last:
                    self._advance()
        for task in scaling:
            self._work(task, partial(self._rescaler.hand_over, task))

    def _find_folds(self, segment: Segment) -> list[Fold]:
        """Where the inputs of a segment can be scaled, tried with the smallest batch."""
        smallest = min(self._passes, key=lambda each: each.batch.token_ids.numel())
        inputs = shared_inputs(dict(linear_modules(segment)), partial(self._try, segment, smallest))
        place = _standing(smallest, segment)
        return self._rescaler.find(segment, inputs, lambda: segment.module(*place.args, **place.kwargs))

    def _observe(self, segment: Segment, groups: Sequence[_Group]) -> dict[str, InputStatistics]:
        """The statistics of all inputs of a segment as it is, from one more run of it."""
        seen = [_Group(group.linears, Gatherer(self._needs())) for group in groups]
        for each in self._passes:

            def gather(_: nn.Module, args: tuple[Any, ...], group: _Group, each: Pass = each) -> None:
                group.gatherer.add(args[0], each.batch)

            with hooked([(group.leader, partial(gather, group=group)) for group in seen]):
                self._try(segment, each)
        return _by_layer(seen)

    def _calibrate_linear(self, segment: Segment, last: bool) -> None:
        """Solve a segment that is one layer, as the head is: what the passes stand before it with is its input."""
        for name, module in self._wanted(segment).items():
            group = _Group({name: module}, Gatherer(self._needs()))
            for each in self._passes:
                group.gatherer.add(_standing(each, segment).args[0], each.batch)
            self._solve(group, group.gatherer.result())
        if not last:
            self._advance()

    def _solve_uncalibrated(self, segment: Segment) -> None:
        wanted = self._wanted(segment)
        fused = dict.fromkeys(names for task in self.tasks for names in task.fused if set(names) <= set(wanted))
        alone = set(wanted) - {name for names in fused for name in names}
        for names in [*fused, *((name,) for name in wanted if name in alone)]:
            self._solve(_Group({name: wanted[name] for name in names}, Gatherer(frozenset())), InputStatistics())

    def _groups(self, segment: Segment) -> list[_Group]:
        """The groups of a segment in the order of their calls, found by trying batches until all layers were seen."""
        wanted = self._wanted(segment)
        smallest_first = sorted(self._passes, key=lambda each: each.batch.token_ids.numel())
        runs = (shared_inputs(wanted, partial(self._try, segment, each)) for each in smallest_first)
        order = call_order(list(wanted), runs) if wanted else []
        return [_Group({name: wanted[name] for name in names}, Gatherer(self._needs())) for names in order]

    def _wanted(self, segment: Segment) -> dict[str, nn.Linear]:
        """The layers of a segment that a task quantizes."""
        tasks = self._alive()
        return {name: module for name, module in linear_modules(segment) if any(name in t.schemes for t in tasks)}

    def _try(self, segment: Segment, each: Pass) -> None:
        """Run a segment with the arguments of a pass that stands before it, which stays where it is."""
        place = _standing(each, segment)
        with suppress(Enough):
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
            self._solve(group, group.gatherer.result())
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
                    raise Enough

                with hooked([(group.leader, gather)]):
                    self._try(segment, each)
            self._solve(group, group.gatherer.result())

    def _solve(self, group: _Group, statistics: InputStatistics) -> None:
        """Solve a group for every task; what a float feed gathered does not know of a task's factors yet."""
        weights = {name: self._originals.weight(name) for name in group.linears}
        leader = next(iter(group.linears))
        for task in self._alive():
            scaling = self._rescaler.of(task)
            scaled = {name: scaling.apply(name, "weight", weight) for name, weight in weights.items()}
            own = scaling.statistics(leader, statistics) if self.settings.feed == "float" else statistics
            with _no_garbage_collection():
                solved = self._work(task, partial(solve_group, task, scaled, own))
            if self.settings.feed == "quantized":
                for name, weight in (solved or {}).items():
                    group.linears[name].weight.data = weight.dequantize(torch.float32).to(self.settings.dtype)
        statistics.derived.clear()  # factors of a wide layer are as large as its Gram matrix
        group.solved = True


def _by_layer(groups: Sequence[_Group]) -> dict[str, InputStatistics]:
    """The finished statistics of each group by the names of its layers."""
    found = [(group, group.gatherer.result()) for group in groups]
    return {name: statistics for group, statistics in found for name in group.linears}


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
