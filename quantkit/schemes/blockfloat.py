"""4-bit floats (E2M1) in small blocks: MXFP4 of the OCP Microscaling specification 1.0, and NVIDIA's NVFP4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from quantkit.errors import SchemeError
from quantkit.schemes.base import Scheme
from quantkit.schemes.kinds import SCHEMES
from quantkit.schemes.rounding import InputRounding

E2M1_TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""E2M1 by code: a sign bit, two exponent bits, one of mantissa."""

INPUTS_OF_FP8 = 128
"""Inputs that share a scale where they are in fp8 beside MXFP4, as compressed-tensors' preset MXFP4XFP8 has it."""


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
    """E2M1 codes in blocks of 32 that share a power of two (E8M0).

    Args:
        activations: has the runtime round a layer's inputs as well: ``dynamic`` to the same numbers, by powers of two
            that come with each token; ``fp8`` to 8-bit floats, with a scale per token and 128 inputs.
    """

    kind: ClassVar[str] = "mxfp4"
    summary: ClassVar[str] = "4-bit floats (E2M1), blocks of 32 that share a power of two"
    source: ClassVar[str] = "OCP Microscaling Formats (MX) specification 1.0"
    grid_class: ClassVar[str] = "quantkit.schemes.grids.blockfloat:Mxfp4Grids"

    activations: Literal["dynamic", "fp8"] | None = None

    @property
    def input_rounding(self) -> InputRounding | None:
        """4-bit floats in blocks, or 8-bit floats, on request."""
        if self.activations is None:
            return None
        return InputRounding("mxfp4") if self.activations == "dynamic" else InputRounding("fp8", INPUTS_OF_FP8)

    def check_layer(self, out_features: int, in_features: int) -> None:
        """Refuse a layer that is not of whole blocks, or whose inputs are not.

        Raises:
            SchemeError: 32, or for inputs in fp8 128, does not divide its row.
        """
        self.groups(in_features)
        if self.activations == "fp8" and in_features % INPUTS_OF_FP8:
            raise SchemeError(
                f"mxfp4 with activations: fp8 needs a multiple of {INPUTS_OF_FP8} input columns, not {in_features}",
                "use activations: dynamic, or keep this layer float with 'ignore'",
            )

    @property
    def group_size(self) -> int:
        """Blocks have 32 weights."""
        return 32

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """4, and 8 bits a block."""
        return 4 + 8 / 32

    def describe(self) -> str:
        """``mxfp4``, and what inputs are rounded to."""
        return {None: "mxfp4", "dynamic": "mxfp4 a4", "fp8": "mxfp4 a8"}[self.activations]


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Nvfp4Scheme(_BlockFloat):
    """E2M1 codes in blocks of 16 that share an E4M3 scale, and one float32 scale per tensor.

    Args:
        activations: ``static`` has the runtime round a layer's inputs to the same numbers, in blocks whose scales come
            with each token, under a scale per tensor that is calibrated.
    """

    kind: ClassVar[str] = "nvfp4"
    summary: ClassVar[str] = "4-bit floats (E2M1), blocks of 16 with E4M3 scales, one float32 scale per tensor"
    source: ClassVar[str] = "NVIDIA, Introducing NVFP4 for efficient and accurate low-precision inference, 2025"
    grid_class: ClassVar[str] = "quantkit.schemes.grids.blockfloat:Nvfp4Grids"

    activations: Literal["static"] | None = None

    @property
    def input_rounding(self) -> InputRounding | None:
        """4-bit floats in blocks under a static scale, on request."""
        return None if self.activations is None else InputRounding("nvfp4", static=True)

    @property
    def group_size(self) -> int:
        """Blocks have 16 weights."""
        return 16

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """4, 8 bits a block, and the tensor's scale."""
        return 4 + 8 / 16 + (0.0 if out_features is None else 32 / (in_features * out_features))

    def describe(self) -> str:
        """``nvfp4``, and what inputs are rounded to."""
        return "nvfp4" if self.activations is None else "nvfp4 a4"
