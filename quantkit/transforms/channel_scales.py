"""Factors per channel: columns of layers are multiplied, and what makes their input is divided by the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quantkit.methods.base import InputStatistics
from quantkit.transforms.base import Change, SmoothingPlace

if TYPE_CHECKING:
    import torch

COLUMNS, ROWS = "columns of ", "rows of "


def scaled_rows(parameter: torch.Tensor, factors: torch.Tensor, offset: float) -> torch.Tensor:
    """A smooth layer's weight or bias with each output channel multiplied; the offset is that of a norm's weight."""
    factors = factors.view(-1, *[1] * (parameter.ndim - 1)).to(parameter.dtype)
    return (parameter + offset) * factors - offset if offset else parameter * factors


@dataclass(slots=True)
class ChannelScales(Change):
    """What is multiplied and divided in one segment.

    Attributes:
        columns: full name of a layer to the factor of each of its input columns, float32 ``[in_features]``.
        rows: full name of a smooth layer to the factor of each of its output channels, and the offset of its weight.
        places: how many inputs could have been scaled.
    """

    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict)
    places: int = 0

    def add(self, place: SmoothingPlace, factors: torch.Tensor) -> None:
        """Scale one input of the segment."""
        self.columns.update(dict.fromkeys(place.balance_layers, factors))
        self.rows[place.smooth_layer] = (1 / place.of_smooth_layer(factors), place.offset)

    def touches(self) -> list[str]:
        """The layers that read the inputs and the modules that make them."""
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
        """The statistics of a layer's input divided by the factors."""
        if layer not in self.columns or found.is_empty():
            return found
        divisor = self.columns[layer]
        return replace(
            found,
            abs_mean=None if found.abs_mean is None else found.abs_mean / divisor,
            square_mean=None if found.square_mean is None else found.square_mean / divisor.square(),
            gram=None if found.gram is None else found.gram / divisor.outer(divisor),
            abs_max=None if found.abs_max is None else found.abs_max / divisor.abs(),
            sample=None if found.sample is None else found.sample / divisor,
            derived={},
            held_out={name: self.statistics(layer, each) for name, each in found.held_out.items()},
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The factors."""
        columns = {f"{COLUMNS}{name}": factors for name, factors in self.columns.items()}
        return columns | {f"{ROWS}{name}": factors for name, (factors, _) in self.rows.items()}

    def to_json(self) -> dict[str, Any]:
        """The offsets of the modules that are divided, and how many could have been."""
        return {"offsets": {name: offset for name, (_, offset) in self.rows.items()}, "places": self.places}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any]) -> ChannelScales:
        """From :meth:`tensors` and :meth:`to_json`."""
        columns = {name.removeprefix(COLUMNS): each for name, each in tensors.items() if name.startswith(COLUMNS)}
        rows = {name: (tensors[f"{ROWS}{name}"], offset) for name, offset in data["offsets"].items()}
        return cls(columns, rows, data["places"])
