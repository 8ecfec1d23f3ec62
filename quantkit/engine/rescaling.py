"""Scaling in a walk: where a segment allows it, what the methods choose, and what that changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from quantkit.engine.scaling import Scaling, choose_scaling
from quantkit.engine.skeleton import Segment, Skeleton, WeightReader
from quantkit.engine.smoothing import SmoothingFinder, SmoothingPlace, Trial
from quantkit.engine.tasks import Task
from quantkit.methods.base import InputStatistics


@dataclass(frozen=True, slots=True)
class Originals:
    """The parameters of the checkpoint in float32, whatever the passes compute in."""

    skeleton: Skeleton
    reader: WeightReader
    device: torch.device

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter by its name in the model."""
        return self.skeleton.read(name, self.reader.read).to(self.device).float()

    def weight(self, path: str) -> torch.Tensor:
        """The weight of the layer at a place of the model, ``[out_features, in_features]``."""
        return self.parameter(f"{path}.weight")


@dataclass(slots=True)
class Rescaler:
    """The factors of all tasks in the segment at which a walk stands.

    Args:
        originals: the parameters of the checkpoint.
    """

    originals: Originals
    _scalings: dict[str, Scaling] = field(default_factory=dict)
    _places: list[SmoothingPlace] = field(default_factory=list)

    @property
    def found(self) -> bool:
        """Whether some input of the segment can be scaled."""
        return bool(self._places)

    def find(self, trial: Trial) -> None:
        """Find where the inputs of a segment can be scaled; what held in the last segment is tried first."""
        finder, inputs = SmoothingFinder(trial), [tuple(layers) for layers in trial.inputs]
        same = bool(self._places) and all(place.balance_layers in inputs for place in self._places)
        if not (same and finder.confirms(self._places)):
            self._places = finder.find()

    def choose(self, task: Task, segment: Segment, statistics: Mapping[str, InputStatistics]) -> None:
        """Have a task choose its factors in a segment from the statistics of each layer's input."""
        weight = self.originals.weight
        self._scalings[task.name] = choose_scaling(
            task, segment.prefix, self._places, weight, statistics, segment.names()
        )

    def of(self, task: Task) -> Scaling:
        """The factors of a task; none where it chose none."""
        return self._scalings.get(task.name, Scaling())

    def apply(self, task: Task, segment: Segment, dtype: torch.dtype) -> None:
        """Put a task's factors into the parameters of the segment through which the passes run."""
        scaling = self.of(task)
        for name in scaling.touches():
            module = segment.module.get_submodule(name.removeprefix(f"{segment.prefix}."))
            for leaf, parameter in module.named_parameters(recurse=False):
                parameter.data = scaling.apply(name, leaf, self.originals.parameter(f"{name}.{leaf}")).to(dtype)

    def put_back(self, task: Task, segment: Segment, dtype: torch.dtype) -> None:
        """Put into the segment what an earlier walk's factors made of its parameters."""
        if task.memory is not None:
            self._scalings[task.name] = task.memory.scaling(segment.prefix).to(self.originals.device)
            self.apply(task, segment, dtype)
            del self._scalings[task.name]

    def hand_over(self, task: Task, segment: Segment) -> None:
        """Give a task's sink the float tensors that its factors in a segment change, and forget the factors."""
        scaling, reader = self._scalings.pop(task.name, Scaling()), self.originals.reader
        if task.memory is not None:
            task.memory.remember_scaling(segment.prefix, scaling)
        names, layers = self.originals.skeleton.names, segment.names()
        for path in scaling.touches():
            floats = ["weight"] if layers.get(path) not in task.schemes else []
            for leaf in [*floats, *(["bias"] if path in scaling.rows else [])]:
                parameter = f"{path}.{leaf}"
                if names.has(parameter):
                    changed = scaling.apply(path, leaf, self.originals.parameter(parameter))
                    dtype = reader.dtype(names.sources(parameter)[0])
                    task.sink.replace(names.written(parameter), changed.to(dtype).cpu())
