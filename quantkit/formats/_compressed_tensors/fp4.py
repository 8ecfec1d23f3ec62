"""``mxfp4-pack-quantized`` and ``nvfp4-pack-quantized``: two E2M1 codes in a byte, the first in its low half."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.formats._compressed_tensors.layout import Layout, quantization_args
from quantkit.formats.base import PackedShapes
from quantkit.schemes import Mxfp4Scheme, Nvfp4Scheme, QuantizedWeight

if TYPE_CHECKING:
    import torch

EXPONENT_BIAS = 127


class _Nibbles(Layout):
    """Codes in ``weight_packed``, uint8 ``[rows, columns / 2]``, and a scale per group.

    Attributes:
        scale_dtypes: of the scales, by suffix.
    """

    scale_dtypes: ClassVar[dict[str, str]]

    def size(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        """Two codes a byte."""
        rows, octets = shapes["weight_packed"]
        return rows, 2 * octets

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        """A scale for each group, and perhaps one for all."""
        found: dict[str, tuple[tuple[int, ...], ...]] = {"weight_scale": ((rows, self.scheme.groups(columns)),)}
        if "weight_global_scale" in self.suffixes:
            found["weight_global_scale"] = ((1,), ())
        return found

    def packed_shapes(self, rows: int, columns: int, scale_dtype: str) -> PackedShapes:
        """Half a byte a weight; scales have dtypes of their own."""
        scales = {suffix: (self.scale_dtypes[suffix], usual[0]) for suffix, usual in self.shapes(rows, columns).items()}
        return {"weight_packed": ("uint8", (rows, columns // 2)), **scales}


class Mxfp4Packed(_Nibbles):
    """Blocks of 32; ``weight_scale`` holds E8M0 exponents as uint8 ``[rows, groups]``."""

    name = "mxfp4-pack-quantized"
    suffixes = ("weight_packed", "weight_scale")
    scale_dtypes: ClassVar[dict[str, str]] = {"weight_scale": "uint8"}

    def __init__(self, scheme: Mxfp4Scheme) -> None:
        self.scheme = scheme

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Codes, and the biased exponents of the scales."""
        import torch

        exponents = torch.frexp(weight.scales).exponent - 1 + EXPONENT_BIAS
        return {"weight_packed": _pack_nibbles(weight.codes), "weight_scale": exponents.to(torch.uint8)}

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""
        import torch

        biased = tensors["weight_scale"]
        scales = torch.ldexp(torch.ones(biased.shape), biased.int() - EXPONENT_BIAS)
        codes = _unpack_nibbles(tensors["weight_packed"])
        return QuantizedWeight(self.scheme, codes, scales, torch.zeros_like(biased))

    def dtypes(self) -> dict[str, torch.dtype]:
        """Bytes."""
        import torch

        return {"weight_packed": torch.uint8, "weight_scale": torch.uint8}

    def weight_args(self) -> dict[str, Any]:
        """4-bit floats in groups with 8-bit exponents."""
        return quantization_args("float", 4, "group", group_size=32, scale_dtype="torch.uint8", zp_dtype="torch.uint8")


class Nvfp4Packed(_Nibbles):
    """Blocks of 16 with E4M3 scales ``[rows, groups]``, and ``weight_global_scale``, float32 ``[1]``, that divides."""

    name = "nvfp4-pack-quantized"
    suffixes = ("weight_packed", "weight_scale", "weight_global_scale")
    scale_dtypes: ClassVar[dict[str, str]] = {"weight_scale": "float8_e4m3fn", "weight_global_scale": "float32"}

    def __init__(self, scheme: Nvfp4Scheme) -> None:
        self.scheme = scheme

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Codes, the local scales and the tensor's."""
        import torch

        return {
            "weight_packed": _pack_nibbles(weight.codes),
            "weight_scale": weight.parts["scales"].contiguous().view(torch.float8_e4m3fn),
            "weight_global_scale": weight.parts["global_scale"],
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""
        import torch

        local, common = tensors["weight_scale"], tensors["weight_global_scale"]
        parts = {"scales": local.view(torch.uint8), "global_scale": common}
        zeros = torch.zeros_like(parts["scales"])
        codes = _unpack_nibbles(tensors["weight_packed"])
        return QuantizedWeight(self.scheme, codes, local.float() / common, zeros, parts)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Bytes, and E4M3."""
        import torch

        return {"weight_packed": torch.uint8, "weight_scale": torch.float8_e4m3fn}

    def weight_args(self) -> dict[str, Any]:
        """4-bit floats in groups with 8-bit float scales."""
        dtypes = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
        return quantization_args("float", 4, "tensor_group", group_size=16, **dtypes)


def _pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes ``[rows, columns]`` below 16 to bytes ``[rows, columns / 2]``."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _unpack_nibbles(octets: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_pack_nibbles`."""
    import torch

    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)
