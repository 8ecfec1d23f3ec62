"""The tasks of a walk, and what each of them is given to solve; one that fails leaves the others alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from quantkit.engine.crew import ALONE, Crew
from quantkit.engine.input_rounding import Rounder, put_rounder
from quantkit.engine.layers import Layer
from quantkit.engine.originals import Originals
from quantkit.engine.segment import Segment
from quantkit.engine.sensitivity import Sensitivity
from quantkit.engine.solve import solve_groups
from quantkit.engine.stacks import InputGroup
from quantkit.engine.tasks import LayerResult, Tuned, VariantTask
from quantkit.engine.transforming import Transforming
from quantkit.engine.tuned_segments import hand_over_tuned, tuned_segment
from quantkit.engine.tuning import Example
from quantkit.engine.worktime import Spent, WorkTime
from quantkit.methods.base import InputStatistics, Statistic
from quantkit.schemes import QuantizedWeight
from quantkit.schemes.rounding import INPUT_SCALE
from quantkit.system.garbage import no_garbage_collection
from quantkit.transforms.base import Change

T = TypeVar("T")


@dataclass(slots=True)
class Solver:
    """The tasks of a walk.

    Args:
        tasks: all of them.
        originals: the parameters of the checkpoint.
        live, mixed: see :class:`quantkit.engine.transforming.Transforming`.
        tries_again: see :class:`quantkit.engine.walk.WalkSettings`.
        sensitivity: see there.

    Attributes:
        transforming: what the transforms of each task do at the segment at which the walk stands.
        failures: by name the tasks that failed and were dropped while others went on.
        tuned: by name what tuning made of the segment at which the walk stands, handed over when it is finished.
        crew: solves the groups that are not solved here.

    A task that remembers a segment from an earlier walk is alive there, and has nothing to do.
    """

    tasks: Sequence[VariantTask]
    originals: Originals
    live: bool
    tries_again: bool
    mixed: bool = False
    sensitivity: Sensitivity | None = None
    crew: Crew = ALONE
    transforming: Transforming = field(init=False)
    failures: dict[str, Exception] = field(default_factory=dict)
    tuned: dict[str, Tuned] = field(default_factory=dict)
    _solved: dict[str, dict[str, QuantizedWeight]] = field(init=False, default_factory=dict)
    _waiting: dict[str, dict[str, LayerResult]] = field(init=False, default_factory=dict)
    _time: WorkTime = field(init=False)

    def __post_init__(self) -> None:
        self.transforming = Transforming(self.originals, self.live, self.mixed)
        self._time = WorkTime(self.originals.device)

    def alive(self) -> list[VariantTask]:
        """The tasks that did not fail."""
        return [task for task in self.tasks if task.name not in self.failures]

    def at_work(self, segment: Segment) -> list[VariantTask]:
        """Those of them that still have layers of a segment to solve."""
        return [task for task in self.alive() if task.lacks(segment.prefix, segment.linears)]

    def observing(self, segment: Segment) -> list[VariantTask]:
        """Those of them that have transforms that are to see the statistics of a segment first."""
        return [task for task in self.at_work(segment) if task.observes]

    def smooths(self) -> bool:
        """Whether some transform asks where inputs can be scaled."""
        return any(task.smooths for task in self.alive())

    def needs(self) -> frozenset[Statistic]:
        """The statistics that some task asks for."""
        return frozenset[Statistic]().union(*(task.needs for task in self.tasks))

    def corrects(self) -> bool:
        """Whether some task corrects layers for what their inputs lost."""
        return any(task.method.corrects for task in self.tasks)

    def tunes(self) -> bool:
        """Whether some task tunes segments."""
        return any(task.tune is not None for task in self.tasks)

    def wanted(self, segment: Segment) -> dict[str, Layer]:
        """The layers of a segment that a task still has to quantize."""
        tasks = self.at_work(segment)
        return {layer.name: layer for layer in segment.layers if any(layer.name in t.schemes for t in tasks)}

    # Work and time

    def work(self, task: VariantTask, work: Callable[[], T]) -> T | None:
        """Do a task's own work and time it; one that fails is dropped, so that it does not take the others down.

        Any error counts, as methods are plugins; the last one standing raises its own.
        """
        try:
            with self._time.of(task.name):
                return work()
        except Exception as error:  # methods and transforms are plugins, which may raise anything
            if self.tries_again and isinstance(error, torch.OutOfMemoryError):
                raise
            self.failures[task.name] = error
            if self.crew.is_alone and not self.alive():
                raise
            return None

    def seconds(self) -> dict[str, float]:
        """By name what each task's own work took so far; a GPU is waited for."""
        return self._time.seconds()

    def clock(self) -> Spent:
        """Starts to count what is spent on a segment."""
        return self._time.clock()

    # The course of a walk

    def begin(self) -> None:
        """Ask the transforms of every task what they do to the whole model."""
        for task in [task for task in self.alive() if task.transforms]:
            self.work(task, partial(self.transforming.begin, task))

    def enter(self, segment: Segment) -> None:
        """Put into a loaded segment what the tasks' transforms make of the whole model, where the passes see it."""
        for task in self.alive()[:1] if self.transforming.mixed else []:
            self.transforming.apply(task, segment)
            for layer in segment.layers:
                if task.rounding_of(layer.name) is not None:
                    put_rounder(layer.module, None)

    def finish(self, segment: Segment, spent: Spent) -> None:
        """Tell every task that solved a segment that all its layers were given.

        Args:
            segment: it.
            spent: since the walk came to it.
        """
        for task in [task for task in self.at_work(segment) if task.transforms]:
            self.work(task, partial(self.transforming.hand_over, task, segment))
        for task in [task for task in self.at_work(segment) if task.name in self.tuned]:
            self.work(task, partial(hand_over_tuned, task, segment, self.tuned.pop(task.name), self.originals))
        tasks = self.at_work(segment)
        taken = self.seconds()
        own = {task.name: taken.get(task.name, 0.0) - spent.own.get(task.name, 0.0) for task in tasks}
        shared = max(0.0, spent.elapsed() - sum(own.values()))
        for task in tasks:
            if task.memory is not None:
                task.memory.remember_seconds(own[task.name], shared)
            self.work(task, partial(task.sink.segment_done, segment.prefix))

    def put_back_changes(self, segment: Segment) -> None:
        """Put what its task's transforms made of a segment in an earlier walk, where inputs are quantized."""
        for task in self.alive():
            self.transforming.put_back(task, segment)

    def tuning(self, segment: Segment) -> list[VariantTask]:
        """The tasks that tune a segment, which they still have to solve."""
        return [task for task in self.at_work(segment) if task.tune is not None]

    def tune(self, segment: Segment, examples: Sequence[Example], *, replace: bool) -> None:
        """Tune a segment all of whose layers are solved, for each task that wants it.

        Args:
            segment: it is loaded.
            examples: what batches bring to it and should leave it with.
            replace: put the result in its place, as with quantized inputs.
        """
        for task in self.tuning(segment):
            solved = self._solved.pop(task.name, {})
            done = self.work(task, partial(tuned_segment, task, segment, examples, solved, self.transforming))
            if done is None:
                continue
            self.tuned[task.name] = done
            for layer in segment.layers if replace else ():
                if layer.name in done.weights:
                    layer.put(done.weights[layer.name].dequantize(torch.float32))
            for name, value in done.floats.items() if replace else ():
                parameter = self.originals.skeleton.model.get_parameter(name)
                parameter.data = value.to(parameter.dtype)

    def put_back(self, segment: Segment) -> None:
        """Put what its task made of a segment in an earlier walk into it, where inputs are quantized."""
        for task in self.alive():
            if task.memory is None:
                continue
            for layer in segment.layers:
                if layer.name in task.schemes:
                    _put(task, layer, task.memory.weight(layer.name).to(self.originals.device))
            for name, value in task.memory.floats(segment.prefix).items():
                parameter = self.originals.skeleton.model.get_parameter(name)
                parameter.data = value.to(parameter.device, parameter.dtype)

    def solve(
        self,
        segment: Segment,
        groups: Sequence[tuple[Mapping[str, Layer], InputStatistics]],
        experts: str = "",
        *,
        replace: bool,
    ) -> None:
        """Solve groups of layers for every task that still has to.

        In a crew others solve others: what is solved waits for :meth:`share`.

        Args:
            segment: they are of.
            groups: layers that share an input, by their names, the one that is called first at the head, and the
                statistics of the input as they were gathered; several if they are alike, as those of experts are.
            experts: what the names of experts begin with; empty for layers that are no experts'.
            replace: put the result in their place, as with quantized inputs.
        """
        layers = {name: layer for members, _ in groups for name, layer in members.items()}
        originals = {name: self.originals.weight(layer.path) for name, layer in layers.items()}
        for task in self.at_work(segment):
            changes = self.transforming.of(task)
            given = []
            for members, found in groups:
                weights = {
                    name: changes.apply(layer.path, "weight", originals[name])
                    for name, layer in members.items()
                    if name in task.schemes
                }
                leader = next(iter(members.values())).path
                told = members.items() if self.sensitivity is not None and task.transforms else ()
                mixed = frozenset(name for name, layer in told if changes.mixes_outputs(layer.path))
                factors = {name: _factors(changes, layer) for name, layer in told if name not in mixed}
                known = self.transforming.statistics(task, leader, found)
                given.append(InputGroup(weights, known, experts, factors, mixed))
            with no_garbage_collection():  # a view of every column and no cycles: it would cost a tenth
                solved = self.work(task, partial(solve_groups, task, given, sensitivity=self.sensitivity)) or []
            if self.crew.is_alone:
                self._give(task, solved, layers, replace=replace)
            else:
                self._waiting.setdefault(task.name, {}).update({result.name: result for result in solved})
        for _, found in groups:
            found.derived.clear()  # factors of a wide layer are as large as its Gram matrix

    def share(self, segment: Segment, layers: Sequence[Layer], *, replace: bool) -> None:
        """Tell the crew what was solved here, and take what the others solved: all that is solved of some layers.

        Args:
            segment: they are of.
            layers: in the order in which one process would solve them.
            replace: put the results in their places.

        Raises:
            Exception: that of a task's failure, where no other task is left.
        """
        if self.crew.is_alone:
            return
        tasks = self.at_work(segment)
        waiting, self._waiting = self._waiting, {}
        told = self.crew.gathered(waiting)
        self.agree()
        by_name = {layer.name: layer for layer in layers}
        for task in [task for task in tasks if task.name not in self.failures]:
            found = {name: result for solved in told for name, result in solved.get(task.name, {}).items()}
            self._give(task, [found[name] for name in by_name if name in found], by_name, replace=replace)
        self.agree()

    def agree(self) -> None:
        """Have the crew drop the same tasks: those that failed anywhere.

        Raises:
            Exception: that of a failure, where no task is left.
        """
        if self.crew.is_alone:
            return
        for failures in self.crew.gathered(self.failures):
            for name, error in failures.items():
                self.failures.setdefault(name, error)
        if not self.alive():
            raise next(iter(self.failures.values()))

    def _give(
        self, task: VariantTask, solved: Sequence[LayerResult], layers: Mapping[str, Layer], *, replace: bool
    ) -> None:
        """Give a task's sink what was solved for it, and put that into the places of the layers."""

        def take() -> None:
            for result in solved:
                task.sink.take(result)

        self.work(task, take)
        for result in solved if task.name not in self.failures else ():
            if replace:
                _put(task, layers[result.name], result.weight)
            if task.tune is not None:
                self._solved.setdefault(task.name, {})[result.name] = result.weight

    def solve_embedding(self, segment: Segment, *, replace: bool) -> None:
        """Solve the input embedding, from its weight alone, for each task that wants it."""
        (layer,) = segment.layers
        original = self.originals.weight(layer.path)
        for task in [task for task in self.alive() if layer.name in task.schemes]:
            started = self.clock()
            weight = self.transforming.of(task).apply(layer.path, "weight", original)
            solved = self._solve_embedding(task, {layer.name: weight}, segment)
            if solved is not None and replace:
                layer.put(solved.dequantize(torch.float32))
            if solved is not None and task.lacks(segment.prefix, segment.linears):
                if task.memory is not None:
                    task.memory.remember_seconds(started.elapsed(), 0.0)
                self.work(task, partial(task.sink.segment_done, segment.prefix))

    def _solve_embedding(
        self, task: VariantTask, weights: Mapping[str, torch.Tensor], segment: Segment
    ) -> QuantizedWeight | None:
        """The quantized embedding of a task, from memory where an earlier walk solved it; None where it fails."""
        (name,) = segment.linears
        if task.memory is not None and task.memory.has(segment.prefix):
            return task.memory.weight(name).to(self.originals.device)
        solve: Callable[[], list[LayerResult]]
        solve = partial(solve_groups, task, [InputGroup(weights, InputStatistics())], embedding=True)
        with no_garbage_collection():
            solved = self.work(task, solve)
        if solved is None:
            return None
        self.work(task, partial(task.sink.take, solved[0]))
        return None if task.name in self.failures else solved[0].weight


def _put(task: VariantTask, layer: Layer, weight: QuantizedWeight) -> None:
    """Let the passes compute with a solved weight, and round the layer's inputs where its scheme does."""
    layer.put(weight.dequantize(torch.float32))
    rounding = task.rounding_of(layer.name)
    if rounding is not None:
        put_rounder(layer.module, Rounder(rounding, weight.parts.get(INPUT_SCALE)))


def _factors(changes: Change, layer: Layer) -> torch.Tensor:
    """By which transforms multiply each output of a layer."""
    return changes.apply(layer.path, "bias", torch.ones(layer.shape[0], device=layer.weight.device))
