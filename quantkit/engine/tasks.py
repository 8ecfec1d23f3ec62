"""What a walk solves: one task a variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from quantkit.engine.ordering import solve
from quantkit.engine.resume_state import Memory
from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics, Method, Solution
from quantkit.schemes import QuantizedWeight, Scheme


@dataclass(frozen=True, slots=True)
class LayerResult:
    """A solved layer.

    Attributes:
        name: full name of the Linear or Embedding.
        weight: its codes, on the device of the walk.
        error: 0-d float32, the mean square of the output error relative to that of the output.
        error_before: the same before the method's refinement; equal to ``error`` if it has none.
        tokens: calibration tokens that reached the layer; 0 for a method that needs none.
        notes: what the user should know.
    """

    name: str
    weight: QuantizedWeight
    error: torch.Tensor
    error_before: torch.Tensor
    tokens: int
    notes: tuple[str, ...]


class Sink(Protocol):
    """Takes the layers of a task as they are solved."""

    def take(self, result: LayerResult) -> None:
        """One layer."""

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """A float tensor of the checkpoint that the variant changes, such as the weight of a norm."""

    def segment_done(self, prefix: str) -> None:
        """All layers of a segment have been given."""


@dataclass(frozen=True, slots=True)
class Task:
    """One variant of a walk.

    Attributes:
        name: of the variant, for messages.
        method: chooses the codes.
        schemes: full name of each layer that is quantized, and its scheme.
        scale_dtype: dtype in which scales are stored.
        sink: takes the results.
        fused: full names of layers that runtimes load as one matrix, which are solved together.
        memory: what an earlier walk left of it, and where this one leaves its own; None for a task that forgets.
    """

    name: str
    method: Method
    schemes: Mapping[str, Scheme]
    scale_dtype: torch.dtype
    sink: Sink
    fused: tuple[tuple[str, ...], ...] = ()
    memory: Memory | None = None

    def lacks(self, prefix: str, layers: Sequence[str]) -> bool:
        """Whether it quantizes some of these layers of a segment, and the segment is still to be solved."""
        wanted = any(layer in self.schemes for layer in layers)
        return wanted and (self.memory is None or not self.memory.has(prefix))


def solve_group(
    task: Task, weights: Mapping[str, torch.Tensor], statistics: InputStatistics, *, embedding: bool = False
) -> dict[str, QuantizedWeight]:
    """Solve the layers of a group that a task wants; those of one scheme are stacked and solved as one.

    Where a scheme does not stack, each layer is solved by itself.

    Args:
        task: the variant.
        weights: float32 ``[out_features, in_features]`` of each layer of the group.
        statistics: of their common input.
        embedding: the group is the input embedding, which no calibration token is expected to reach.

    Returns:
        The weights by layer.

    Raises:
        QuantizationError: naming the layer.
    """
    solved: dict[str, QuantizedWeight] = {}
    method = task.method.for_embeddings() if embedding else task.method
    for names, scheme in _stacks(task, list(weights)):
        stacked = torch.cat([weights[name] for name in names]) if len(names) > 1 else weights[names[0]]
        try:
            solution = solve(method, stacked, statistics, scheme, task.scale_dtype)
        except QuantizationError as error:
            raise QuantizationError(f"{task.name}: {names[0]}: {error.problem}", error.remedy) from error
        start = 0
        for name in names:
            stop = start + weights[name].shape[0]
            result = _layer(name, solution, start, stop, statistics, needs=bool(method.needs) and not embedding)
            task.sink.take(result)
            solved[name] = result.weight
            start = stop
    return solved


def _stacks(task: Task, names: list[str]) -> list[tuple[list[str], Scheme]]:
    """The layers that a task wants, those that can be solved as one together."""
    stacks: dict[Scheme, list[str]] = {}
    alone = []
    for name in names:
        scheme = task.schemes.get(name)
        if scheme is not None and scheme.stacks:
            stacks.setdefault(scheme, []).append(name)
        elif scheme is not None:
            alone.append(([name], scheme))
    return [*((members, scheme) for scheme, members in stacks.items()), *alone]


def _layer(
    name: str, solution: Solution, start: int, stop: int, statistics: InputStatistics, needs: bool
) -> LayerResult:
    energy = solution.energy[start:stop].sum().clamp_(min=torch.finfo(torch.float32).tiny)
    error = solution.error[start:stop].sum() / energy
    before = error if solution.error_before is None else solution.error_before[start:stop].sum() / energy
    notes = solution.notes
    if needs and statistics.tokens == 0:
        notes = (*notes, "no calibration token reached this layer: its inputs were taken as uncorrelated")
    return LayerResult(name, solution.weight.rows(start, stop), error, before, statistics.tokens, notes)
