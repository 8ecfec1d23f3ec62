"""4-bit floats (E2M1) in small blocks: MXFP4 of the OCP Microscaling specification 1.0, and NVIDIA's NVFP4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quantkit.schemes.base import Scheme
from quantkit.schemes.kinds import SCHEMES

E2M1_TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""E2M1 by code: a sign bit, two exponent bits, one of mantissa."""


class _BlockFloat(Scheme):
    table: ClassVar[tuple[float, ...]] = E2M1_TABLE

    @property
    def bits(self) -> int:
        """Codes have 4 bits."""
        return 4

    @property
    def free_scales(self) -> bool:
        """Scales are 8-bit numbers themselves."""
        return False

    def _ways_out(self, in_features: int) -> str:
        return f"{self.kind} has blocks of {self.group_size} only: keep this layer float with 'ignore'"


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Mxfp4Scheme(_BlockFloat):
    """E2M1 codes in blocks of 32 that share a power of two (E8M0)."""

    kind: ClassVar[str] = "mxfp4"
    summary: ClassVar[str] = "4-bit floats (E2M1), blocks of 32 that share a power of two"
    source: ClassVar[str] = "OCP Microscaling Formats (MX) specification 1.0"
    grid_class: ClassVar[str] = "quantkit.schemes.grids.blockfloat:Mxfp4Grids"

    @property
    def group_size(self) -> int:
        """Blocks have 32 weights."""
        return 32

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """4, and 8 bits a block."""
        return 4 + 8 / 32

    def describe(self) -> str:
        """``mxfp4``."""
        return "mxfp4"


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Nvfp4Scheme(_BlockFloat):
    """E2M1 codes in blocks of 16 that share an E4M3 scale, and one float32 scale per tensor."""

    kind: ClassVar[str] = "nvfp4"
    summary: ClassVar[str] = "4-bit floats (E2M1), blocks of 16 with E4M3 scales, one float32 scale per tensor"
    source: ClassVar[str] = "NVIDIA, Introducing NVFP4 for efficient and accurate low-precision inference, 2025"
    grid_class: ClassVar[str] = "quantkit.schemes.grids.blockfloat:Nvfp4Grids"

    @property
    def group_size(self) -> int:
        """Blocks have 16 weights."""
        return 16

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """4, 8 bits a block, and the tensor's scale."""
        return 4 + 8 / 16 + (0.0 if out_features is None else 32 / (in_features * out_features))

    def describe(self) -> str:
        """``nvfp4``."""
        return "nvfp4"
