"""A quantized checkpoint as a source of weights: its packed layers are decoded when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from quantkit.errors import CheckpointError
from quantkit.exports.base import Export
from quantkit.numerics.low_rank import LowRank
from quantkit.system.host import all_finite


class DecodedReader:
    """The tensors of the float model that a quantized checkpoint stands for, by their names there.

    Args:
        export: the checkpoint.
        terms: by layer what is added to its decoded weight.
    """

    def __init__(self, export: Export, terms: Mapping[str, LowRank] = MappingProxyType({})) -> None:
        self._export, self._terms = export, terms
        self._floats = set(export.float_names())

    def names(self) -> list[str]:
        """All of them."""
        return [*self._export.float_names(), *(f"{layer}.weight" for layer in self._export.schemes)]

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._floats or self._layer(name) is not None

    def dtype(self, name: str) -> torch.dtype:
        """Of a packed layer float32, in which it is decoded."""
        return torch.float32 if self._layer(name) is not None else self._export.float_dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """A tensor, of a packed layer float32 ``[out_features, in_features]``.

        Raises:
            CheckpointError: the file is broken.
        """
        layer = self._layer(name)
        if layer is None:
            return self._export.float_tensor(name)
        weight = self._export.decodable(layer).dequantize(torch.float32)
        return weight + self._terms[layer].product() if layer in self._terms else weight

    def read_finite(self, name: str) -> torch.Tensor:
        """A tensor without NaN and infinities.

        Raises:
            CheckpointError: it holds some.
        """
        found = self.read(name)
        if not all_finite(found):
            raise CheckpointError(f"tensor {name} of {self._export.path} holds NaN or infinities", "export it again")
        return found

    def _layer(self, name: str) -> str | None:
        """The packed layer that a tensor is the weight of; None for others."""
        layer = name.removesuffix(".weight")
        return layer if layer != name and layer in self._export.schemes else None
