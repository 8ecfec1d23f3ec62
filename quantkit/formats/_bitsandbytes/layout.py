"""What a layout of bitsandbytes is: the tensors of a layer, and the keys of the config that belong to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.formats.base import PackedShapes
from quantkit.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    import torch


class Layout(ABC):
    """How one scheme is stored.

    Attributes:
        scheme: the scheme.
        suffixes: of the names of a layer's tensors.
        computes_in: the dtypes in which bitsandbytes multiplies with such layers.
        remark: what someone who loads such a checkpoint should know.
    """

    scheme: Scheme
    suffixes: tuple[str, ...]
    computes_in: tuple[str, ...]
    remark: str

    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The nearest weight that this layout can hold."""
        return weight

    @abstractmethod
    def pack(self, weight: QuantizedWeight, dtype: str) -> dict[str, torch.Tensor]:
        """The tensors of a layer of a float model of ``dtype``, by suffix."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`.

        Raises:
            CheckpointError: the tensors are not those of the scheme.
        """

    @abstractmethod
    def size(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        """``(out_features, in_features)`` from the shapes of the tensors; ``read`` gives a small one by suffix."""

    @abstractmethod
    def packed_shapes(self, rows: int, columns: int, dtype: str) -> PackedShapes:
        """The tensors of :meth:`pack`."""

    @abstractmethod
    def config(self, dtype: str) -> dict[str, Any]:
        """The keys of ``quantization_config`` that tell this layout."""
