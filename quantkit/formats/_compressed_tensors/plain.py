"""``int-quantized`` and ``float-quantized``: 8-bit weights as tensors of their own dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.formats._compressed_tensors.layout import Layout, integer_args, quantization_args
from quantkit.formats.base import PackedShapes
from quantkit.schemes import Fp8Scheme, IntScheme, QuantizedWeight
from quantkit.schemes.floating import BLOCK

if TYPE_CHECKING:
    import torch


class IntQuantized(Layout):
    """W8A8: int8 weights with a scale per channel, inputs rounded to int8 per token or per tensor.

    Weights alone, and scales by group, are for embeddings, which have no packed layout. Files of other tools may also
    have fewer bits, zero points, and one scale per tensor.
    """

    name = "int-quantized"

    def __init__(self, scheme: IntScheme) -> None:
        self.scheme: IntScheme = scheme
        self.suffixes = ("weight", "weight_scale", *(() if scheme.symmetric else ("weight_zero_point",)))

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Signed codes and scales ``[rows, groups]``."""
        tensors = {"weight": self._signed(weight.codes), "weight_scale": weight.scales.contiguous()}
        if not self.scheme.symmetric:
            tensors["weight_zero_point"] = self._signed(weight.zeros)
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""
        import torch

        codes = self._unsigned(tensors["weight"])
        scales = tensors["weight_scale"].view(-1, 1) if tensors["weight_scale"].ndim < 2 else tensors["weight_scale"]
        zeros = torch.full_like(scales, self.scheme.zero, dtype=torch.uint8)
        if not self.scheme.symmetric:
            zeros = self._unsigned(tensors["weight_zero_point"]).view(scales.shape)
        spread = codes.shape[0] // scales.shape[0]
        return QuantizedWeight(self.scheme, codes, scales.repeat(spread, 1), zeros.repeat(spread, 1))

    def size(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        """The shape of the codes."""
        rows, columns = shapes["weight"]
        return rows, columns

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        """A scale and a zero point for each group, or one for all."""
        groups = self.scheme.groups(columns)
        scales = ((rows, groups), *(((1,), (), (rows,), (1, 1)) if groups == 1 else ()))
        return {suffix: scales for suffix in self.suffixes if suffix != "weight"}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Signed bytes."""
        import torch

        return dict.fromkeys((suffix for suffix in self.suffixes if suffix != "weight_scale"), torch.int8)

    def packed_shapes(self, rows: int, columns: int, scale_dtype: str) -> PackedShapes:
        """A byte a weight, and scales."""
        groups = (rows, self.scheme.groups(columns))
        found: PackedShapes = {"weight": ("int8", (rows, columns)), "weight_scale": (scale_dtype, groups)}
        return found if self.scheme.symmetric else found | {"weight_zero_point": ("int8", groups)}

    def _signed(self, codes: torch.Tensor) -> torch.Tensor:
        import torch

        return (codes.to(torch.int16) - self.scheme.zero).to(torch.int8)

    def _unsigned(self, signed: torch.Tensor) -> torch.Tensor:
        import torch

        return (signed.to(torch.int16) + self.scheme.zero).to(torch.uint8)

    def weight_args(self) -> dict[str, Any]:
        """8-bit integers by group or channel."""
        return integer_args(self.scheme)


class FloatQuantized(Layout):
    """E4M3 weights with a scale per tensor, ``[1]``, per channel, ``[rows, 1]``, or per block of 128 x 128.

    For weights alone the package's own name is ``naive-quantized``; it reads the same tensors under either.
    """

    name = "float-quantized"
    suffixes = ("weight", "weight_scale")

    def __init__(self, scheme: Fp8Scheme) -> None:
        self.scheme: Fp8Scheme = scheme

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The E4M3 numbers, and each scale once."""
        import torch

        scales = {
            "tensor": weight.scales[:1, 0],
            "channel": weight.scales,
            "block": weight.scales[::BLOCK],
        }[self.scheme.granularity]
        return {"weight": weight.codes.contiguous().view(torch.float8_e4m3fn), "weight_scale": scales.contiguous()}

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""
        import torch

        codes, scales = tensors["weight"].view(torch.uint8), tensors["weight_scale"]
        rows = codes.shape[0]
        if self.scheme.granularity == "tensor":
            scales = scales.view(1, 1).repeat(rows, 1)
        elif self.scheme.granularity == "block":
            scales = scales.repeat_interleave(BLOCK, dim=0)[:rows]
        else:
            scales = scales.view(rows, 1)
        return QuantizedWeight(self.scheme, codes, scales, torch.zeros_like(scales, dtype=torch.uint8))

    def size(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        """The shape of the codes."""
        rows, columns = shapes["weight"]
        return rows, columns

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        """One scale, one a row, or one a block."""
        blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
        allowed: dict[str, tuple[tuple[int, ...], ...]] = {
            "tensor": ((1,), (), (1, 1)),
            "channel": ((rows, 1), (rows,)),
            "block": (blocks,),
        }
        return {"weight_scale": allowed[self.scheme.granularity]}

    def dtypes(self) -> dict[str, torch.dtype]:
        """E4M3."""
        import torch

        return {"weight": torch.float8_e4m3fn}

    def packed_shapes(self, rows: int, columns: int, scale_dtype: str) -> PackedShapes:
        """A byte a weight, and scales."""
        scales = self.shapes(rows, columns)["weight_scale"][0]
        return {"weight": ("float8_e4m3fn", (rows, columns)), "weight_scale": (scale_dtype, scales)}

    def weight_args(self) -> dict[str, Any]:
        """8-bit floats by tensor, channel or block."""
        if self.scheme.granularity == "block":
            return quantization_args("float", 8, "block", block_structure=[BLOCK, BLOCK])
        return quantization_args("float", 8, self.scheme.granularity)
