"""What AffineQuant does to a block: factors of channels, and a matrix for each head of values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quantkit.methods.base import InputStatistics
from quantkit.transforms.base import Change
from quantkit.transforms.channel_scales import ChannelScales

if TYPE_CHECKING:
    import torch

MATRICES, INDEX = "matrices of ", "heads of "


@dataclass(slots=True)
class Affine(Change):
    """Factors of channels, and matrices of heads of values.

    Attributes:
        scales: the factors; those of values with matrices are in these.
        matrices: by layers of values ``A`` of each head, float32 ``[heads, size, size]``: columns of the reader are
            multiplied by it, and values by its inverse.
        readers: layers that read values, with these.
        index: of each head that a reader reads, int64 ``[heads read]``, which of the values it is.
        told: the block's error before and after, relative to no transform.
    """

    scales: ChannelScales = field(default_factory=ChannelScales)
    matrices: dict[str, torch.Tensor] = field(default_factory=dict)
    readers: dict[str, str] = field(default_factory=dict)
    index: dict[str, torch.Tensor] = field(default_factory=dict)
    told: dict[str, float] = field(default_factory=dict)

    def touches(self) -> list[str]:
        """What is scaled, and layers of values with their readers."""
        return list(dict.fromkeys([*self.scales.touches(), *self.matrices, *self.readers]))

    def apply(self, module: str, leaf: str, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter as it becomes."""
        import torch

        parameter = self.scales.apply(module, leaf, parameter)
        if leaf == "weight" and module in self.readers:
            matrices = self._read(module).to(parameter)
            heads = parameter.view(len(parameter), len(matrices), -1)
            parameter = torch.einsum("rhi,hij->rhj", heads, matrices).reshape(parameter.shape)
        if module in self.matrices:
            matrices = self.matrices[module].to(parameter)
            rows = parameter.reshape(len(matrices), matrices.shape[1], -1)
            parameter = torch.linalg.solve(matrices, rows).reshape(parameter.shape)
        return parameter

    def _read(self, reader: str) -> torch.Tensor:
        """``A`` of each head that a layer reads."""
        values = self.readers[reader]
        return self.matrices[values][self.index[reader].to(self.matrices[values].device)]

    def statistics(self, layer: str, found: InputStatistics) -> InputStatistics:
        """The statistics of a layer's input as it becomes; magnitudes of mixed inputs are those of the sample."""
        import torch

        found = self.scales.statistics(layer, found)
        if layer not in self.readers or found.is_empty():
            return found
        mixed = torch.block_diag(*torch.linalg.inv(self._read(layer)))  # type: ignore[no-untyped-call]  # torch's
        gram = None if found.gram is None else mixed @ found.gram @ mixed.T
        sample = None if found.sample is None else found.sample @ mixed.T
        held = {name: self.statistics(layer, each) for name, each in found.held_out.items()}
        return replace(
            found,
            gram=gram,
            sample=sample,
            square_mean=None if found.square_mean is None or gram is None else gram.diagonal().clone(),
            abs_mean=None if found.abs_mean is None or sample is None else sample.abs().mean(0),
            abs_max=None if found.abs_max is None or sample is None else sample.abs().amax(0),
            derived={},
            held_out=held,
        )

    def mixes_outputs(self, module: str) -> bool:
        """Those of layers of values are."""
        return module in self.matrices

    def tensors(self) -> dict[str, torch.Tensor]:
        """Factors, matrices, and which head is which."""
        own = {f"{MATRICES}{name}": each for name, each in self.matrices.items()}
        return self.scales.tensors() | own | {f"{INDEX}{name}": each for name, each in self.index.items()}

    def to_json(self) -> dict[str, Any]:
        """What is scaled and mixed, and the block's errors."""
        return {**self.scales.to_json(), "readers": self.readers, **self.told}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any]) -> Affine:
        """From :meth:`tensors` and :meth:`to_json`."""

        def named(start: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)}

        told = {key: data[key] for key in ("before", "after") if key in data}
        return cls(ChannelScales.of(tensors, data), named(MATRICES), dict(data["readers"]), named(INDEX), told)

    def detached(self) -> Affine:
        """A copy without gradients and without what is told of it."""
        scales = self.scales
        return Affine(
            ChannelScales(
                {name: each.detach().clone() for name, each in scales.columns.items()},
                {name: (each.detach().clone(), offset) for name, (each, offset) in scales.rows.items()},
                scales.places,
            ),
            {name: each.detach().clone() for name, each in self.matrices.items()},
            self.readers,
            self.index,
        )
