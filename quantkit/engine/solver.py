"""Solving groups of layers for every task of a walk; a task that fails leaves the others alone."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import TypeVar

import torch

from quantkit.engine.layers import Layer
from quantkit.engine.rescaling import Originals, Rescaler
from quantkit.engine.skeleton import Segment
from quantkit.engine.tasks import Task, solve_group
from quantkit.methods.base import InputStatistics, Statistic
from quantkit.schemes import QuantizedWeight

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spent:
    """What was spent when the walk came to a segment.

    Attributes:
        own: by name the seconds of each task.
        since: the clock then.
    """

    own: Mapping[str, float]
    since: float = field(default_factory=perf_counter)

    def elapsed(self) -> float:
        """Seconds since then, in all."""
        return perf_counter() - self.since


@dataclass(slots=True)
class Solver:
    """The tasks of a walk.

    Args:
        tasks: all of them.
        originals: the parameters of the checkpoint.
        dtype: in which the forward passes compute.
        scales: the statistics that are given know nothing of a task's factors yet, as in a float feed.

    Attributes:
        rescaler: the factors of each task in the segment at which the walk stands.
        failures: by name the tasks that failed and were dropped while others went on.
        seconds: by name what each task's own work took.
        tries_again: see :class:`quantkit.engine.walk.WalkSettings`.

    A task that remembers a segment from an earlier walk is alive there, and has nothing to do.
    """

    tasks: Sequence[Task]
    originals: Originals
    dtype: torch.dtype
    scales: bool
    rescaler: Rescaler = field(init=False)
    failures: dict[str, Exception] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tries_again: bool = False

    def __post_init__(self) -> None:
        self.rescaler = Rescaler(self.originals)

    def alive(self) -> list[Task]:
        """The tasks that did not fail."""
        return [task for task in self.tasks if task.name not in self.failures]

    def at_work(self, segment: Segment) -> list[Task]:
        """Those of them that still have layers of a segment to solve."""
        return [task for task in self.alive() if task.lacks(segment.prefix, segment.linears)]

    def looks_for_places(self) -> bool:
        """Whether some method asks for factors of the inputs."""
        return any(task.method.scales_inputs for task in self.alive())

    def scaling(self, segment: Segment) -> list[Task]:
        """The tasks that still have to choose factors of the inputs of a segment."""
        return [task for task in self.at_work(segment) if task.method.scales_inputs]

    def needs(self) -> frozenset[Statistic]:
        """The statistics that some task asks for."""
        return frozenset[Statistic]().union(*(task.method.needs for task in self.tasks))

    def wanted(self, segment: Segment) -> dict[str, Layer]:
        """The layers of a segment that a task still has to quantize."""
        tasks = self.at_work(segment)
        return {layer.name: layer for layer in segment.layers if any(layer.name in t.schemes for t in tasks)}

    def work(self, task: Task, work: Callable[[], T]) -> T | None:
        """Do a task's own work and time it; one that fails is dropped, so that it does not take the others down.

        Any error counts, as methods are plugins; the last one standing raises its own.
        """
        started = perf_counter()
        try:
            return work()
        except Exception as error:  # methods are plugins, which may raise anything
            if self.tries_again and isinstance(error, torch.OutOfMemoryError):
                raise
            self.failures[task.name] = error
            if not self.alive():
                raise
            return None
        finally:
            self.seconds[task.name] = self.seconds.get(task.name, 0.0) + perf_counter() - started

    def finish(self, segment: Segment, spent: Spent) -> None:
        """Tell every task that solved a segment that all its layers were given.

        Args:
            segment: it.
            spent: since the walk came to it.
        """
        tasks = self.at_work(segment)
        own = {task.name: self.seconds.get(task.name, 0.0) - spent.own.get(task.name, 0.0) for task in tasks}
        shared = max(0.0, spent.elapsed() - sum(own.values()))
        for task in tasks:
            if task.memory is not None:
                task.memory.remember_seconds(own[task.name], shared)
            self.work(task, partial(task.sink.segment_done, segment.prefix))

    def clock(self) -> Spent:
        """Starts to count what is spent on a segment."""
        return Spent(dict(self.seconds))

    def put_back(self, segment: Segment) -> None:
        """Put the weights into a segment that its task gave it in an earlier walk, for a feed that is quantized."""
        for task in self.alive():
            self.rescaler.put_back(task, segment, self.dtype)
            for layer in segment.layers:
                if task.memory is not None and layer.name in task.schemes:
                    weight = task.memory.weight(layer.name).to(self.originals.device)
                    layer.put(weight.dequantize(torch.float32))

    def solve(
        self, segment: Segment, layers: Mapping[str, Layer], statistics: InputStatistics, *, replace: bool
    ) -> None:
        """Solve layers that share an input for every task that still has to.

        Args:
            segment: they are of.
            layers: by their names, the one that is called first at the head.
            statistics: of their input.
            replace: put the result in their place, for a feed that is quantized.
        """
        weights = {name: self.originals.weight(layer.path) for name, layer in layers.items()}
        leader = next(iter(layers.values())).path
        for task in self.at_work(segment):
            scaling = self.rescaler.of(task)
            scaled = {name: scaling.apply(layers[name].path, "weight", weight) for name, weight in weights.items()}
            own = scaling.statistics(leader, statistics) if self.scales else statistics
            with _no_garbage_collection():
                solved = self.work(task, partial(solve_group, task, scaled, own))
            if replace:
                for name, weight in (solved or {}).items():
                    layers[name].put(weight.dequantize(torch.float32))
        statistics.derived.clear()  # factors of a wide layer are as large as its Gram matrix

    def solve_embedding(self, segment: Segment, *, replace: bool) -> None:
        """Solve the input embedding, from its weight alone, for each task that wants it."""
        (layer,) = segment.layers
        name = layer.name
        weights = {name: self.originals.weight(layer.path)}
        for task in [task for task in self.alive() if name in task.schemes]:
            started = self.clock()
            solved = self._solve_embedding(task, weights, segment)
            if solved is not None and replace:
                layer.put(solved.dequantize(torch.float32))
            if solved is not None and task.lacks(segment.prefix, [name]):
                if task.memory is not None:
                    task.memory.remember_seconds(started.elapsed(), 0.0)
                self.work(task, partial(task.sink.segment_done, segment.prefix))

    def _solve_embedding(
        self, task: Task, weights: Mapping[str, torch.Tensor], segment: Segment
    ) -> QuantizedWeight | None:
        """The quantized embedding of a task, from memory where an earlier walk solved it; None where it fails."""
        (name,) = segment.linears
        if task.memory is not None and task.memory.has(segment.prefix):
            return task.memory.weight(name).to(self.originals.device)
        solve: Callable[[], dict[str, QuantizedWeight]]
        solve = partial(solve_group, task, weights, InputStatistics(), embedding=True)
        with _no_garbage_collection():
            solved = self.work(task, solve)
        return None if solved is None else solved[name]


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
