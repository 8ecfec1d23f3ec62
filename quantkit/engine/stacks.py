"""Layers that share an input, and those of them that are solved as one matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from quantkit.engine.tasks import VariantTask
from quantkit.methods.base import InputStatistics
from quantkit.schemes import Scheme
from quantkit.schemes.rounding import InputRounding

STACKED = 1 << 24
"""Weights of several layers that a CPU solves as one at most: with more it gains nothing by that, and a method holds up
to eleven times as much."""


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Layers that share an input.

    Attributes:
        weights: float32 ``[out_features, in_features]`` of each, as the transforms left them.
        statistics: of the input, likewise.
        experts: what the names of the experts begin with whose layers they are; else empty.
        factors: by which transforms multiply each output of a layer, float32 ``[out_features]``; nothing for 1.
        mixed: layers whose outputs transforms mix: what the model's loss minds of each is then alike.
        input_scales: static ones, as far as they were asked for; they follow from the weights, too, so that they are
            not among what is derived of the statistics for all tasks.
    """

    weights: Mapping[str, torch.Tensor]
    statistics: InputStatistics
    experts: str = ""
    factors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    mixed: frozenset[str] = frozenset()
    input_scales: dict[InputRounding, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stack:
    """Layers of a group that are solved as one matrix, with the statistics that the method asks for.

    ``shares`` has of each that was corrected for what its input lost, by how much; see
    :mod:`quantkit.numerics.mismatch`.
    """

    names: Sequence[str]
    weight: torch.Tensor
    statistics: InputStatistics
    group: InputGroup
    shares: Mapping[str, float] = field(default_factory=dict)


def stacked(group: InputGroup, names: Sequence[str]) -> torch.Tensor:
    """The weights of some layers of a group, one below another."""
    weights = [group.weights[name] for name in names]
    return torch.cat(weights) if len(names) > 1 else weights[0]


def stacks_of(task: VariantTask, weights: Mapping[str, torch.Tensor]) -> list[tuple[list[str], Scheme]]:
    """The layers that a task wants, those that can be solved as one together, as long as they are not too large."""
    stacks: dict[Scheme, list[list[str]]] = {}
    alone = []
    for name, weight in weights.items():
        scheme = task.schemes.get(name)
        if scheme is not None and scheme.stacks:
            parts = stacks.setdefault(scheme, [[]])
            if parts[-1] and not fits(weight, sum(weights[each].numel() for each in [*parts[-1], name])):
                parts.append([])
            parts[-1].append(name)
        elif scheme is not None:
            alone.append(([name], scheme))
    return [*((members, scheme) for scheme, parts in stacks.items() for members in parts), *alone]


def fits(weight: torch.Tensor, together: int) -> bool:
    """Whether so many weights are solved as one, on the device of one of them."""
    return weight.device.type != "cpu" or together <= STACKED
