"""Block types of GGML, which llama.cpp computes with: the K-quants, and IQ4_NL.

A K-quant puts 256 weights of a row into a super-block. Its sub-blocks of 16 or 32 weights have a scale each, and with
some types a minimum, in few bits; a float16 scale for all of these scales, and one for the minima, belong to the
super-block. ``w = scale * code - minimum``, or ``scale * (code - 2**(bits - 1))`` without minima.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quantkit.errors import SchemeError
from quantkit.schemes.base import Scheme, TableScheme
from quantkit.schemes.kinds import SCHEMES

SUPER_BLOCK = 256
KQUANT_SOURCE = "llama.cpp pull request 1684 (k-quants)"
IQ4_NL_TABLE = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip
"""IQ4_NL by code, in units of a block's scale."""


class GgmlScheme(Scheme):
    """A block type of GGML.

    Weights that llama.cpp's own quantizer made hold their blocks as the part ``blocks``, uint8 ``[rows, bytes]``;
    others hold the pieces of which their scales are made, see :mod:`quantkit.schemes.grids.ggml`.

    Attributes:
        ggml_type: its name in GGML.
        width: of a code, in bits.
        sub_block: weights that share a scale.
        minima: whether a sub-block has a minimum.
        steps: the lowest and the highest whole number of which a sub-block's scale is made, and its minimum up to the
            highest.
        block: weights of a block.
        block_bytes: bytes of a block.
    """

    authors_method: ClassVar[str | None] = "llama.cpp"
    grid_class: ClassVar[str] = "quantkit.schemes.grids.ggml:KQuantGrids"
    ggml_type: ClassVar[str]
    width: ClassVar[int]
    sub_block: ClassVar[int]
    minima: ClassVar[bool] = False
    steps: ClassVar[tuple[int, int]]
    block: ClassVar[int] = SUPER_BLOCK
    block_bytes: ClassVar[int]

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.width

    @property
    def group_size(self) -> int:
        """Weights of a sub-block."""
        return self.sub_block

    @property
    def symmetric(self) -> bool:
        """Whether there are no minima."""
        return not self.minima

    @property
    def zero(self) -> int:
        """The zero point where there are no minima."""
        return 1 << (self.width - 1)

    @property
    def free_scales(self) -> bool:
        """Scales of sub-blocks are whole multiples of one of the super-block."""
        return False

    def check_layer(self, out_features: int, in_features: int) -> None:
        """Refuse a layer whose rows are not whole blocks.

        Raises:
            SchemeError: blocks do not divide them; the remedy names a mixture, where layers fall back to other types.
        """
        if in_features % self.block:
            raise SchemeError(
                f"{self.kind} has blocks of {self.block} weights, which do not divide the {in_features} input columns",
                "use a mixture of llama.cpp such as q4_k_m, where such layers get a type with blocks of 32, or keep "
                "this layer float with 'ignore'",
            )

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """Bits of a block, scales and minima included, by its weights."""
        return self.block_bytes * 8 / self.block

    def row_bytes(self, in_features: int) -> int:
        """Bytes of the blocks of a row."""
        return in_features // self.block * self.block_bytes

    def describe(self) -> str:
        """Its kind, such as ``q4_k``."""
        return self.kind


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q2KScheme(GgmlScheme):
    """Sub-blocks of 16 with 4-bit scales and minima."""

    kind: ClassVar[str] = "q2_k"
    summary: ClassVar[str] = "llama.cpp's Q2_K: 2-bit codes, 4-bit scales and minima per 16"
    source: ClassVar[str] = KQUANT_SOURCE
    ggml_type: ClassVar[str] = "Q2_K"
    width: ClassVar[int] = 2
    sub_block: ClassVar[int] = 16
    minima: ClassVar[bool] = True
    steps: ClassVar[tuple[int, int]] = (1, 15)
    block_bytes: ClassVar[int] = 84


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q3KScheme(GgmlScheme):
    """Sub-blocks of 16 with signed 6-bit scales."""

    kind: ClassVar[str] = "q3_k"
    summary: ClassVar[str] = "llama.cpp's Q3_K: 3-bit codes, 6-bit scales per 16"
    source: ClassVar[str] = KQUANT_SOURCE
    ggml_type: ClassVar[str] = "Q3_K"
    width: ClassVar[int] = 3
    sub_block: ClassVar[int] = 16
    steps: ClassVar[tuple[int, int]] = (-32, 31)
    block_bytes: ClassVar[int] = 110


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q4KScheme(GgmlScheme):
    """Sub-blocks of 32 with 6-bit scales and minima."""

    kind: ClassVar[str] = "q4_k"
    summary: ClassVar[str] = "llama.cpp's Q4_K: 4-bit codes, 6-bit scales and minima per 32"
    source: ClassVar[str] = KQUANT_SOURCE
    ggml_type: ClassVar[str] = "Q4_K"
    width: ClassVar[int] = 4
    sub_block: ClassVar[int] = 32
    minima: ClassVar[bool] = True
    steps: ClassVar[tuple[int, int]] = (1, 63)
    block_bytes: ClassVar[int] = 144


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q5KScheme(GgmlScheme):
    """Sub-blocks of 32 with 6-bit scales and minima."""

    kind: ClassVar[str] = "q5_k"
    summary: ClassVar[str] = "llama.cpp's Q5_K: 5-bit codes, 6-bit scales and minima per 32"
    source: ClassVar[str] = KQUANT_SOURCE
    ggml_type: ClassVar[str] = "Q5_K"
    width: ClassVar[int] = 5
    sub_block: ClassVar[int] = 32
    minima: ClassVar[bool] = True
    steps: ClassVar[tuple[int, int]] = (1, 63)
    block_bytes: ClassVar[int] = 176


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q6KScheme(GgmlScheme):
    """Sub-blocks of 16 with signed 8-bit scales."""

    kind: ClassVar[str] = "q6_k"
    summary: ClassVar[str] = "llama.cpp's Q6_K: 6-bit codes, 8-bit scales per 16"
    source: ClassVar[str] = KQUANT_SOURCE
    ggml_type: ClassVar[str] = "Q6_K"
    width: ClassVar[int] = 6
    sub_block: ClassVar[int] = 16
    steps: ClassVar[tuple[int, int]] = (-128, 127)
    block_bytes: ClassVar[int] = 210


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Iq4NlScheme(GgmlScheme, TableScheme):
    """Blocks of 32 with a float16 scale, and levels that lie closer about zero."""

    kind: ClassVar[str] = "iq4_nl"
    summary: ClassVar[str] = "llama.cpp's IQ4_NL: 16 levels closer about zero, blocks of 32"
    source: ClassVar[str] = "llama.cpp pull request 5590 (IQ4_NL)"
    grid_class: ClassVar[str] = "quantkit.schemes.grids.ggml:Iq4NlGrids"
    ggml_type: ClassVar[str] = "IQ4_NL"
    table: ClassVar[tuple[float, ...]] = IQ4_NL_TABLE
    width: ClassVar[int] = 4
    sub_block: ClassVar[int] = 32
    block: ClassVar[int] = 32
    block_bytes: ClassVar[int] = 18

    @property
    def zero(self) -> int:
        """Levels are not integers."""
        return 0

    @property
    def free_scales(self) -> bool:
        """Each block has a scale of its own."""
        return True
