"""What a sub-format of compressed-tensors is: the tensors of a layer, and what the config says of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.formats.base import PackedShapes
from quantkit.schemes import PER_CHANNEL, IntScheme, QuantizedWeight, Scheme
from quantkit.schemes.rounding import TOKEN, InputRounding

if TYPE_CHECKING:
    import torch

GET_AGAIN = "config and tensors do not fit each other: get the checkpoint again"
STATIC_OBSERVER = "static_minmax"
"""What the package calls the largest magnitude over all calibration tokens."""


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
        rounding = self.scheme.input_rounding
        return None if rounding is None else rounding_args(rounding)

    @property
    def input_suffix(self) -> str | None:
        """Of the tensor that holds the static scale of a layer's inputs; None where it has none."""
        rounding = self.scheme.input_rounding
        if rounding is None or not rounding.static:
            return None
        return "input_global_scale" if rounding.numbers == "nvfp4" else "input_scale"

    @property
    def all_suffixes(self) -> tuple[str, ...]:
        """Those of the weight, and that of the static scale of inputs."""
        return self.suffixes if self.input_suffix is None else (*self.suffixes, self.input_suffix)


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


def rounding_args(rounding: InputRounding) -> dict[str, Any]:
    """Activations that the runtime rounds, as the package's presets have them."""
    match rounding.numbers:
        case "nvfp4":
            dtypes = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
            return quantization_args(
                "float", 4, "tensor_group", group_size=16, dynamic="local", observer=STATIC_OBSERVER, **dtypes
            )
        case "mxfp4":
            dtypes = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
            return quantization_args("float", 4, "group", group_size=32, dynamic=True, observer=None, **dtypes)
    kind = "int" if rounding.numbers == "int8" else "float"
    if rounding.static:
        return quantization_args(kind, 8, "tensor", observer=STATIC_OBSERVER)
    size = None if rounding.group_size == TOKEN else rounding.group_size
    strategy = "token" if size is None else "group"
    return quantization_args(kind, 8, strategy, group_size=size, dynamic=True, observer=None)
