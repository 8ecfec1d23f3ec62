"""What a codec is: the codes of one scheme as the raw blocks of one GGML type, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantkit.schemes import QuantizedWeight

if TYPE_CHECKING:
    import torch


class Codec(ABC):
    """Packs the weights of one scheme.

    Attributes:
        kind: name of the GGML type, such as ``Q4_0``.
    """

    kind: str

    @abstractmethod
    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The nearest weight that the type holds.

        Raises:
            QuantizationError: a number is beyond what the type holds.
        """

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Raw blocks, ``weight`` uint8 ``[rows, row_bytes]``, of what :meth:`fitted` gives."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`.

        Raises:
            CheckpointError: the blocks are not those of the scheme.
        """
