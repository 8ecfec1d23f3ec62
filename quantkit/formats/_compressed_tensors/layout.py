"""What a sub-format of compressed-tensors is: the tensors of a layer, and what the config says of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.formats.base import PackedShapes
from quantkit.schemes import PER_CHANNEL, IntScheme, QuantizedWeight, Scheme

if TYPE_CHECKING:
    import torch

GET_AGAIN = "config and tensors do not fit each other: get the checkpoint again"


class Layout(ABC):
    """How one scheme is stored.

    Attributes:
        name: the ``format`` that a config group gives.
        scheme: the scheme.
        suffixes: of the names of a layer's tensors.
    """

    name: ClassVar[str]
    scheme: Scheme
    suffixes: tuple[str, ...]

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The tensors of a layer by suffix."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""

    @abstractmethod
    def size(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        """``(out_features, in_features)`` of a layer.

        Args:
            shapes: of its tensors, by suffix.
            read: gives a tensor by suffix; only small ones are asked for.

        Raises:
            ValueError: the codes are no matrix.
        """

    @abstractmethod
    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The shapes that the tensors of a layer may have, by suffix, the usual one first."""

    @abstractmethod
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes that the codes must have, by suffix."""

    @abstractmethod
    def packed_shapes(self, rows: int, columns: int, scale_dtype: str) -> PackedShapes:
        """The tensors of :meth:`pack`, with scales of a dtype."""

    @abstractmethod
    def weight_args(self) -> dict[str, Any]:
        """The ``weights`` of a config group."""

    def input_args(self) -> dict[str, Any] | None:
        """The ``input_activations`` of a config group; None leaves them as they are."""
        return None


def quantization_args(kind: str, bits: int, strategy: str, **changes: Any) -> dict[str, Any]:
    """Weights with static scales, as the package's ``QuantizationArgs`` names things.

    Args:
        kind: ``int`` or ``float``.
        bits: width of a code.
        strategy: what shares a scale.
        changes: keys that differ, or are given beside these.
    """
    common = {"symmetric": True, "group_size": None, "actorder": None, "dynamic": False, "observer": "minmax"}
    return {"num_bits": bits, "type": kind, "strategy": strategy, **common, **changes}


def integer_args(scheme: IntScheme) -> dict[str, Any]:
    """Integer weights with a scale per group or channel."""
    size, symmetric = scheme.group_size, scheme.symmetric
    if size == PER_CHANNEL:
        return quantization_args("int", scheme.bits, "channel", symmetric=symmetric)
    return quantization_args("int", scheme.bits, "group", group_size=size, symmetric=symmetric)


def dynamic_args(kind: str, strategy: str, group_size: int | None = None) -> dict[str, Any]:
    """Activations that the runtime rounds to 8 bits, by scales that it finds as they come."""
    return quantization_args(kind, 8, strategy, group_size=group_size, dynamic=True, observer=None)
