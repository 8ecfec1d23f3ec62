"""4-bit codebooks of QLoRA: a table of 16 numbers in ``-1 .. 1``, scaled by the largest magnitude of each block.

NF4 and FP4 with double quantization of the scales are those of Dettmers et al. 2023 (arXiv:2305.14314) as
bitsandbytes stores them; the table values are the ones of its documentation and code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quantkit.errors import SchemeError
from quantkit.schemes.base import TableScheme
from quantkit.schemes.kinds import SCHEMES

NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NF4 by code: quantiles of a normal distribution, with an exact zero (arXiv:2305.14314, appendix E)."""
FP4_TABLE = (
    0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
    0.0, -0.005208333333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25,
)  # fmt: skip
"""bitsandbytes' FP4 by code: sign, two exponent bits, one of mantissa, divided by the largest; both zeros are +0."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
"""Scales that share one scale of their own under double quantization."""


@dataclass(frozen=True, slots=True)
class CodebookScheme(TableScheme):
    """16 levels and a float32 scale per block, itself stored in 8 bits with ``double_quant``.

    Args:
        group_size: weights of a block.
        double_quant: store the blocks' scales in 8 bits, with a float32 scale per 256 of them and one offset.
    """

    grid_class: ClassVar[str] = "quantkit.schemes.grids.codebook:CodebookGrids"

    group_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.group_size not in BLOCK_SIZES:
            allowed = ", ".join(map(str, BLOCK_SIZES))
            raise SchemeError(f"{self.kind} has no block of {self.group_size} weights", f"group_size can be {allowed}")

    @property
    def bits(self) -> int:
        """Codes have 4 bits."""
        return 4

    def _ways_out(self, in_features: int) -> str:
        sizes = [str(size) for size in BLOCK_SIZES if in_features % size == 0]
        return f"sizes that do: {', '.join(sizes)}" if sizes else "no block does: keep this layer float with 'ignore'"

    @property
    def stacks(self) -> bool:
        """Double quantization mixes the scales of all rows."""
        return not self.double_quant

    @property
    def free_scales(self) -> bool:
        """Without double quantization a scale is any float32."""
        return not self.double_quant

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """4, and the share of the scale: 32 bits a block, or 8 and a share of what scales the scales."""
        if not self.double_quant:
            return 4 + 32 / self.group_size
        offset = 0.0 if out_features is None else 32 / (in_features * out_features)
        return 4 + (8 + 32 / NESTED_BLOCK) / self.group_size + offset

    def describe(self) -> str:
        """A short name, such as ``nf4 g64 dq``."""
        return f"{self.kind} g{self.group_size}{' dq' if self.double_quant else ''}"


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Nf4Scheme(CodebookScheme):
    """4-bit NormalFloat."""

    kind: ClassVar[str] = "nf4"
    summary: ClassVar[str] = "quantiles of a normal distribution, blocks of 64, double quantization"
    source: ClassVar[str] = "Dettmers et al. 2023, arXiv:2305.14314"
    table: ClassVar[tuple[float, ...]] = NF4_TABLE


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Fp4Scheme(CodebookScheme):
    """bitsandbytes' 4-bit float."""

    kind: ClassVar[str] = "fp4"
    summary: ClassVar[str] = "bitsandbytes' 4-bit float, blocks of 64, double quantization"
    source: ClassVar[str] = "Dettmers et al. 2023, arXiv:2305.14314"
    table: ClassVar[tuple[float, ...]] = FP4_TABLE
