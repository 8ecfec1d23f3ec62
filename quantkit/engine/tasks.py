"""What a walk solves: one task a variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics, Method, Solution
from quantkit.schemes import IntScheme, QuantizedWeight


@dataclass(frozen=True, slots=True)
class LayerResult:
    """A solved layer.

    Attributes:
        name: full name of the Linear.
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

    def segment_done(self, prefix: str) -> None:
        """All layers of a segment have been given."""


@dataclass(frozen=True, slots=True)
class Task:
    """One variant of a walk.

    Attributes:
        name: of the variant, for messages.
        method: chooses the codes.
        schemes: full name of each Linear that is quantized, and its scheme.
        scale_dtype: dtype in which scales are stored.
        sink: takes the results.
    """

    name: str
    method: Method
    schemes: Mapping[str, IntScheme]
    scale_dtype: torch.dtype
    sink: Sink


def solve_group(
    task: Task, weights: Mapping[str, torch.Tensor], statistics: InputStatistics
) -> dict[str, torch.Tensor]:
    """Solve the layers of a group that a task wants; those of one scheme are stacked and solved as one.

    Args:
        task: the variant.
        weights: float32 ``[out_features, in_features]`` of each layer of the group.
        statistics: of their common input.

    Returns:
        The dequantized weights by layer, float32.

    Raises:
        QuantizationError: naming the layer.
    """
    replaced: dict[str, torch.Tensor] = {}
    for scheme in dict.fromkeys(task.schemes[name] for name in weights if name in task.schemes):
        names = [name for name in weights if task.schemes.get(name) == scheme]
        stacked = torch.cat([weights[name] for name in names])
        try:
            solution = task.method.quantize(stacked, statistics, scheme, task.scale_dtype)
        except QuantizationError as error:
            raise QuantizationError(f"{task.name}: {names[0]}: {error.problem}", error.remedy) from error
        start = 0
        for name in names:
            stop = start + weights[name].shape[0]
            result = _layer(name, solution, start, stop, statistics, needs=bool(task.method.needs))
            task.sink.take(result)
            replaced[name] = result.weight.dequantize(torch.float32)
            start = stop
    return replaced


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
