"""8-bit floats: E4M3 of the OCP 8-bit floating point specification, without infinities, largest value 448."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from quantkit.errors import SchemeError
from quantkit.schemes.base import PER_CHANNEL, Scheme
from quantkit.schemes.kinds import SCHEMES
from quantkit.schemes.rounding import InputRounding

BLOCK = 128


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Fp8Scheme(Scheme):
    """E4M3 codes with one scale per tensor, per output channel, or per block of 128 x 128 weights.

    Args:
        granularity: what shares a scale.
        activations: has the runtime round a layer's inputs to E4M3 as well: ``dynamic`` with a scale per token,
            ``static`` with a calibrated scale per tensor.
    """

    kind: ClassVar[str] = "fp8"
    summary: ClassVar[str] = "8-bit floats (E4M3), a scale per tensor, channel or 128x128 block"
    source: ClassVar[str] = "Micikevicius et al. 2022, arXiv:2209.05433"
    grid_class: ClassVar[str] = "quantkit.schemes.grids.floating:Fp8Grids"

    granularity: Literal["tensor", "channel", "block"] = "channel"
    activations: Literal["dynamic", "static"] | None = None

    def __post_init__(self) -> None:
        if self.granularity not in ("tensor", "channel", "block"):
            raise SchemeError(f"fp8 has no granularity '{self.granularity}'", "use tensor, channel or block")
        if self.activations not in (None, "dynamic", "static"):
            raise SchemeError(f"fp8 has no activations '{self.activations}'", "use dynamic or static, or leave it out")
        if self.activations == "static" and self.granularity == "block":
            raise SchemeError(
                "fp8 blocks have no static scale of inputs", "use activations: dynamic, or granularity: channel"
            )

    @property
    def input_rounding(self) -> InputRounding | None:
        """8-bit floats per token, per token and block, or per tensor, on request."""
        static = self.activations == "static"
        return None if self.activations is None else InputRounding("fp8", self.group_size, static)

    @property
    def bits(self) -> int:
        """Codes have 8 bits."""
        return 8

    @property
    def group_size(self) -> int:
        """128 for blocks, else whole rows."""
        return BLOCK if self.granularity == "block" else PER_CHANNEL

    @property
    def stacks(self) -> bool:
        """Blocks would reach from one layer into the next."""
        return self.granularity != "block"

    @property
    def free_scales(self) -> bool:
        """Only scales per channel belong to a row."""
        return self.granularity == "channel"

    def groups(self, in_features: int) -> int:
        """Groups of a row; the last block may be cut short."""
        return -(-in_features // self.columns_per_group(in_features))

    def check_layer(self, out_features: int, in_features: int) -> None:
        """Refuse a layer whose inputs do not come in whole blocks, where a runtime rounds them by blocks.

        Raises:
            SchemeError: 128 does not divide ``in_features``.
        """
        if self.granularity == "block" and self.activations is not None and in_features % BLOCK:
            raise SchemeError(
                f"fp8 blocks with dynamic activations need a multiple of {BLOCK} input columns, not {in_features}",
                "use granularity: channel, leave out activations, or keep this layer float with 'ignore'",
            )

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """8, and the share of a scale."""
        if self.granularity == "channel":
            return 8 + scale_bits / in_features
        if out_features is None:
            return 8.0
        scales = 1 if self.granularity == "tensor" else -(-out_features // BLOCK) * self.groups(in_features)
        return 8 + scales * scale_bits / (in_features * out_features)

    def describe(self) -> str:
        """A short name, such as ``fp8 channel``."""
        rounded = {None: "", "dynamic": " a8", "static": " a8 static"}[self.activations]
        return f"fp8 {self.granularity}{rounded}"
