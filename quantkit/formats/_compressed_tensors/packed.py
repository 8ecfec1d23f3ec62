"""``pack-quantized``: integer codes and zero points as a dense stream of bits.

Codes lie along the rows, zero points along the columns of ``[rows, groups]``. For 3 bits the stream is dense from
version 0.18 of the package on; earlier ones put ten codes in a word and leave two bits of it empty.

Scales of a symmetric scheme may be negative, see :func:`quantkit.numerics.grid_search.search_grid`; the package
decompresses them exactly. vLLM's Marlin kernel misreads them in its opt-in mode with int8 activations
(https://github.com/vllm-project/vllm/issues/48905).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError
from quantkit.formats._compressed_tensors.layout import GET_AGAIN, Layout, integer_args
from quantkit.formats.base import PackedShapes
from quantkit.schemes import IntScheme, QuantizedWeight
from quantkit.schemes.bitstream import pack_bits, unpack_bits

if TYPE_CHECKING:
    import torch


class PackQuantized(Layout):
    """Integers of 1 to 8 bits, grouped or per channel; also with rounded inputs, but for 8 bits per channel."""

    name = "pack-quantized"

    def __init__(self, scheme: IntScheme) -> None:
        self.scheme: IntScheme = scheme
        zeros = () if scheme.symmetric else ("weight_zero_point",)
        order = ("weight_g_idx",) if scheme.desc_act else ()
        self.suffixes = ("weight_packed", "weight_scale", "weight_shape", *zeros, *order)

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
        if self.scheme.desc_act:
            tensors["weight_g_idx"] = weight.parts["g_idx"].to(torch.int32)
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""
        import torch

        scheme = self.scheme
        rows, columns = self._checked_size(tensors)
        scales = tensors["weight_scale"]
        if scheme.symmetric:
            zeros = torch.full(scales.shape, scheme.zero, dtype=torch.uint8)
        else:
            zeros = unpack_bits(tensors["weight_zero_point"].T, scheme.bits, rows).T.contiguous()
        codes = unpack_bits(tensors["weight_packed"], scheme.bits, columns)
        parts = {"g_idx": tensors["weight_g_idx"].int()} if scheme.desc_act else {}
        return QuantizedWeight(scheme, codes, scales, zeros, parts)

    def _checked_size(self, tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
        """Rows and columns as ``weight_shape`` says, which must be those that the codes have room for."""
        said = [int(size) for size in tensors["weight_shape"].flatten()]
        words = tuple(tensors["weight_packed"].shape)
        if len(said) != 2 or min(said) < 1 or words != (said[0], -(-said[1] * self.scheme.bits // 32)):
            raise CheckpointError(
                f"weight_shape says the shape {said}, and its codes have the shape {list(words)}",
                GET_AGAIN,
            )
        return said[0], said[1]

    def size(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor]) -> tuple[int, int]:
        """As ``weight_shape`` says."""
        rows, columns = (int(size) for size in read("weight_shape"))
        return rows, columns

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Whole words at the ends of rows of codes, and of columns of zero points."""
        groups = self.scheme.groups(columns)
        found = {
            "weight_packed": (rows, -(-columns * self.scheme.bits // 32)),
            "weight_scale": (rows, groups),
            "weight_zero_point": (-(-rows * self.scheme.bits // 32), groups),
            "weight_g_idx": (columns,),
        }
        return {suffix: (shape,) for suffix, shape in found.items() if suffix in self.suffixes}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Words of 32 bits."""
        import torch

        return {"weight_packed": torch.int32}

    def packed_shapes(self, rows: int, columns: int, scale_dtype: str) -> PackedShapes:
        """Words, scales, and the shape itself as two numbers."""
        words = dict.fromkeys(("weight_packed", "weight_zero_point", "weight_g_idx"), "int32")
        dtypes = {**words, "weight_scale": scale_dtype}
        found = {suffix: (dtypes[suffix], usual) for suffix, (usual,) in self.shapes(rows, columns).items()}
        return {**found, "weight_shape": ("int64", (2,))}

    def weight_args(self) -> dict[str, Any]:
        """Integers by group or channel."""
        return integer_args(self.scheme)
