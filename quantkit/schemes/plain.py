"""16-bit floats: weights as they are, rounded to the dtype in which servers keep them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quantkit.schemes.base import PER_CHANNEL, Scheme
from quantkit.schemes.kinds import SCHEMES


class PlainScheme(Scheme):
    """Not quantized: every tensor of the model in one float dtype.

    Attributes:
        dtype: that dtype; None leaves each tensor in its own.
    """

    quantizer: ClassVar[str | None] = "none"
    dtype: ClassVar[str | None]

    @property
    def bits(self) -> int:
        """Of a float."""
        return 16

    @property
    def group_size(self) -> int:
        """There are no scales."""
        return PER_CHANNEL

    @property
    def free_scales(self) -> bool:
        """There are none."""
        return False

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """16."""
        return 16.0

    def describe(self) -> str:
        """The kind."""
        return self.kind


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Float16Scheme(PlainScheme):
    """IEEE half precision."""

    kind: ClassVar[str] = "float16"
    dtype: ClassVar[str | None] = "float16"
    summary: ClassVar[str] = "not quantized: every tensor in float16"
    source: ClassVar[str] = "IEEE 754-2008, binary16"


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class BFloat16Scheme(PlainScheme):
    """The upper half of a float32."""

    kind: ClassVar[str] = "bfloat16"
    dtype: ClassVar[str | None] = "bfloat16"
    summary: ClassVar[str] = "not quantized: every tensor in bfloat16"
    source: ClassVar[str] = "Kalamkar et al. 2019, arXiv:1905.12322"


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class SourceFloatScheme(PlainScheme):
    """The float model as it is."""

    kind: ClassVar[str] = "float"
    summary: ClassVar[str] = "not quantized: every tensor in the dtype of the float model"
    source: ClassVar[str] = "-"
    dtype: ClassVar[str | None] = None
