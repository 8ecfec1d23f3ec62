"""``int-quantized`` and ``float-quantized``: 8-bit weights as tensors of their own dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantkit.formats._compressed_tensors.layout import Layout, dynamic_args, integer_args, quantization_args
from quantkit.schemes import Fp8Scheme, IntScheme, QuantizedWeight
from quantkit.schemes.floating import BLOCK

if TYPE_CHECKING:
    import torch


class IntQuantized(Layout):
    """W8A8: int8 weights with a scale per channel, inputs rounded to int8 per token.

    Weights alone, and scales by group, are for embeddings, which have no packed layout.
    """

    name = "int-quantized"
    suffixes = ("weight", "weight_scale")

    def __init__(self, scheme: IntScheme) -> None:
        self.scheme = scheme

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Signed codes and scales ``[rows, groups]``."""
        import torch

        signed = (weight.codes.to(torch.int16) - self.scheme.zero).to(torch.int8)
        return {"weight": signed, "weight_scale": weight.scales.contiguous()}

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""
        import torch

        codes = (tensors["weight"].to(torch.int16) + self.scheme.zero).to(torch.uint8)
        scales = tensors["weight_scale"]
        return QuantizedWeight(self.scheme, codes, scales, torch.full_like(scales, self.scheme.zero, dtype=torch.uint8))

    def weight_args(self) -> dict[str, Any]:
        """8-bit integers by group or channel."""
        return integer_args(self.scheme)

    def input_args(self) -> dict[str, Any] | None:
        """8-bit integers per token."""
        return None if self.scheme.activations is None else dynamic_args("int", "token")


class FloatQuantized(Layout):
    """E4M3 weights with a scale per tensor, ``[1]``, per channel, ``[rows, 1]``, or per block of 128 x 128.

    For weights alone the package's own name is ``naive-quantized``; it reads the same tensors under either.
    """

    name = "float-quantized"
    suffixes = ("weight", "weight_scale")

    def __init__(self, scheme: Fp8Scheme) -> None:
        self.scheme = scheme

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
        return QuantizedWeight(self.scheme, codes, scales, torch.zeros_like(scales, dtype=torch.uint8))

    def weight_args(self) -> dict[str, Any]:
        """8-bit floats by tensor, channel or block."""
        if self.scheme.granularity == "block":
            return quantization_args("float", 8, "block", block_structure=[BLOCK, BLOCK])
        return quantization_args("float", 8, self.scheme.granularity)

    def input_args(self) -> dict[str, Any] | None:
        """8-bit floats per token, for blocks per token and 128 columns, as the package's preset FP8_BLOCK has it."""
        if self.scheme.activations is None:
            return None
        if self.scheme.granularity == "block":
            return dynamic_args("float", "group", BLOCK)
        return dynamic_args("float", "token")
