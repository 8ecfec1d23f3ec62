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
from torch import nn

from quantkit.engine.rescaling import Originals, Rescaler
from quantkit.engine.skeleton import Segment, linear_modules
from quantkit.engine.tasks import Task, solve_group
from quantkit.methods.base import InputStatistics, Statistic
from quantkit.schemes import QuantizedWeight

T = TypeVar("T")


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
    """

    tasks: Sequence[Task]
    originals: Originals
    dtype: torch.dtype
    scales: bool
    rescaler: Rescaler = field(init=False)
    failures: dict[str, Exception] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rescaler = Rescaler(self.originals)

    def alive(self) -> list[Task]:
        """The tasks that did not fail."""
        return [task for task in self.tasks if task.name not in self.failures]

    def scaling(self) -> list[Task]:
        """Those whose method asks for factors of the inputs."""
        return [task for task in self.alive() if task.method.scales_inputs]

    def needs(self) -> frozenset[Statistic]:
        """The statistics that some task asks for."""
        return frozenset[Statistic]().union(*(task.method.needs for task in self.tasks))

    def wanted(self, segment: Segment) -> dict[str, nn.Linear]:
        """The layers of a segment that a task quantizes."""
        tasks = self.alive()
        return {name: module for name, module in linear_modules(segment) if any(name in t.schemes for t in tasks)}

    def work(self, task: Task, work: Callable[[], T]) -> T | None:
        """Do a task's own work and time it; one that fails is dropped, so that it does not take the others down.

        Any error counts, as methods are plugins; the last one standing raises its own.
        """
        started = perf_counter()
        try:
            return work()
        except Exception as error:
            self.failures[task.name] = error
            if not self.alive():
                raise
            return None
        finally:
            self.seconds[task.name] = self.seconds.get(task.name, 0.0) + perf_counter() - started

    def finish(self, segment: Segment) -> None:
        """Tell every task that all layers of a segment were given."""
        for task in self.alive():
            self.work(task, partial(task.sink.segment_done, segment.prefix))

    def solve(self, linears: Mapping[str, nn.Linear], statistics: InputStatistics, *, replace: bool) -> None:
        """Solve layers that share an input for every task.

        Args:
            linears: the layers by full name, the one that is called first at the head.
            statistics: of their input.
            replace: put the result in their place, for a feed that is quantized.
        """
        weights = {name: self.originals.weight(name) for name in linears}
        leader = next(iter(linears))
        for task in self.alive():
            scaling = self.rescaler.of(task)
            scaled = {name: scaling.apply(name, "weight", weight) for name, weight in weights.items()}
            own = scaling.statistics(leader, statistics) if self.scales else statistics
            with _no_garbage_collection():
                solved = self.work(task, partial(solve_group, task, scaled, own))
            if replace:
                for name, weight in (solved or {}).items():
                    linears[name].weight.data = weight.dequantize(torch.float32).to(self.dtype)
        statistics.derived.clear()  # factors of a wide layer are as large as its Gram matrix

    def solve_embedding(self, segment: Segment, *, replace: bool) -> None:
        """Solve the input embedding, from its weight alone, for each task that wants it."""
        name = segment.prefix
        weights = {name: self.originals.weight(name)}
        for task in [task for task in self.alive() if name in task.schemes]:
            solve: Callable[[], dict[str, QuantizedWeight]]
            solve = partial(solve_group, task, weights, InputStatistics(), embedding=True)
            with _no_garbage_collection():
                solved = self.work(task, solve)
            if solved is not None:
                self.work(task, partial(task.sink.segment_done, name))
            if solved is not None and replace:
                decoded = solved[name].dequantize(torch.float32)
                segment.module.get_parameter("weight").data = decoded.to(self.dtype)


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
