"""The factors by which a variant scales the inputs of its layers, and what they change in a segment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from quantkit.engine.smoothing import SmoothingPlace, scaled_rows
from quantkit.engine.tasks import Task
from quantkit.methods.base import InputStatistics


@dataclass(slots=True)
class Scaling:
    """What one variant multiplies and divides in one segment.

    Attributes:
        columns: full name of a layer to the factor of each of its input columns, float32 ``[in_features]``.
        rows: full name of a smooth layer to the factor of each of its output channels, and the offset of its weight.
    """

    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict)

    def add(self, prefix: str, place: SmoothingPlace, factors: torch.Tensor) -> None:
        """Scale one input of the segment with this prefix."""
        self.columns.update({f"{prefix}.{reader}": factors for reader in place.balance_layers})
        self.rows[f"{prefix}.{place.smooth_layer}"] = (1 / place.of_smooth_layer(factors), place.offset)

    def to(self, device: torch.device | str) -> Scaling:
        """The same on another device."""
        rows = {name: (factors.to(device), offset) for name, (factors, offset) in self.rows.items()}
        return Scaling({name: factors.to(device) for name, factors in self.columns.items()}, rows)

    def touches(self) -> list[str]:
        """Full names of the modules that it changes."""
        return list(dict.fromkeys([*self.columns, *self.rows]))

    def apply(self, module: str, leaf: str, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter of a module, called ``weight`` or ``bias``, as it becomes."""
        if leaf == "weight" and module in self.columns:
            parameter = parameter * self.columns[module].to(parameter.dtype)
        if module in self.rows:
            factors, offset = self.rows[module]
            parameter = scaled_rows(parameter, factors, offset if leaf == "weight" else 0.0)
        return parameter

    def statistics(self, layer: str, found: InputStatistics) -> InputStatistics:
        """The statistics of a layer's input as it becomes, from those of the input as it was."""
        if layer not in self.columns or found.tokens == 0:
            return found
        divisor = self.columns[layer]
        return replace(
            found,
            abs_mean=None if found.abs_mean is None else found.abs_mean / divisor,
            square_mean=None if found.square_mean is None else found.square_mean / divisor.square(),
            gram=None if found.gram is None else found.gram / torch.outer(divisor, divisor),
            derived={},
        )


def choose_scaling(
    task: Task,
    prefix: str,
    places: Sequence[SmoothingPlace],
    weight: Callable[[str], torch.Tensor],
    statistics: Mapping[str, InputStatistics],
    names: Mapping[str, str],
) -> Scaling:
    """Have a task's method choose factors for each place whose balance layers it quantizes.

    Args:
        task: the variant.
        prefix: of the segment.
        places: of the segment.
        weight: a layer's float32 weight by its full name.
        statistics: by the name of a layer in the checkpoint, of its input.
        names: the names in the checkpoint of the layers of the segment, by their paths.
    """
    scaling = Scaling()
    for place in places:
        readers = [f"{prefix}.{reader}" for reader in place.balance_layers]
        members = [(weight(path), task.schemes[names[path]]) for path in readers if names[path] in task.schemes]
        known = next((statistics[names[path]] for path in readers if names[path] in statistics), None)
        if not members or known is None or known.tokens == 0:
            continue
        factors = task.method.channel_factors(members, known, task.scale_dtype, place.channels)
        if factors is not None:
            scaling.add(prefix, place, factors)
    return scaling
