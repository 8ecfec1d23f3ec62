"""``pack-quantized``: integer codes and zero points as a dense stream of bits.

Codes lie along the rows, zero points along the columns of ``[rows, groups]``. For 3 bits the stream is dense from
version 0.18 of the package on; earlier ones put ten codes in a word and leave two bits of it empty.

Scales of a symmetric scheme may be negative, see :func:`quantkit.numerics.grids.search_grid`; the package decompresses
them exactly. vLLM's Marlin kernel misreads them in its opt-in mode with int8 activations
(https://github.com/vllm-project/vllm/issues/48905).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantkit.bitstream import pack_bits, unpack_bits
from quantkit.formats._compressed_tensors.layout import Layout, integer_args
from quantkit.schemes import IntScheme, QuantizedWeight

if TYPE_CHECKING:
    import torch


class PackQuantized(Layout):
    """Integers of 1 to 8 bits, grouped or per channel."""

    name = "pack-quantized"

    def __init__(self, scheme: IntScheme) -> None:
        self.scheme = scheme
        common = ("weight_packed", "weight_scale", "weight_shape")
        self.suffixes = common if scheme.symmetric else (*common, "weight_zero_point")

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Packed codes, scales, shape and, if asymmetric, packed zero points."""
        import torch

        bits = self.scheme.bits
        tensors = {
            "weight_packed": pack_bits(weight.codes, bits),
            "weight_scale": weight.scales.contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if not self.scheme.symmetric:
            tensors["weight_zero_point"] = pack_bits(weight.zeros.T, bits).T.contiguous()
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""
        import torch

        scheme = self.scheme
        rows, columns = (int(size) for size in tensors["weight_shape"])
        scales = tensors["weight_scale"]
        if scheme.symmetric:
            zeros = torch.full(scales.shape, scheme.zero, dtype=torch.uint8)
        else:
            zeros = unpack_bits(tensors["weight_zero_point"].T, scheme.bits, rows).T.contiguous()
        return QuantizedWeight(scheme, unpack_bits(tensors["weight_packed"], scheme.bits, columns), scales, zeros)

    def weight_args(self) -> dict[str, Any]:
        """Integers by group or channel."""
        return integer_args(self.scheme)
