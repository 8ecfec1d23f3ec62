"""Schemes: which numbers a weight can become, and how many bits that costs.

A scheme is a grid. Asymmetric: ``w = (code - zero) * scale``, with codes and zeros in ``0 .. 2**bits - 1``
and one scale and zero per output row and group of input columns. Symmetric: the same with
``zero = 2**(bits - 1)``, so that it need not be stored. This is the uniform affine quantization of
Jacob et al. 2018 (arXiv:1712.05877), laid out per group as in GPTQ (arXiv:2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantkit.errors import SchemeError

if TYPE_CHECKING:
    import torch

PER_CHANNEL = -1
INTEGER_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class IntScheme:
    """Integer codes with a scale, and if asymmetric a zero point, per row and group.

    Args:
        bits: width of a code: 2, 3, 4 or 8.
        group_size: input columns that share a scale; ``-1`` is one scale per output row.
        symmetric: the zero point is fixed at ``2**(bits - 1)`` and not stored.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in INTEGER_BITS:
            allowed = ", ".join(map(str, INTEGER_BITS))
            raise SchemeError(f"bits {self.bits} is not a width that quantkit has", f"allowed: {allowed}")
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise SchemeError(f"group_size {self.group_size} is not positive", "use -1 for one scale per channel")

    @property
    def levels(self) -> int:
        """Number of different codes."""
        return 1 << self.bits

    @property
    def zero(self) -> int:
        """The zero point of the symmetric grid."""
        return 1 << (self.bits - 1)

    def columns_per_group(self, in_features: int) -> int:
        """Input columns that share one scale, for a layer with ``in_features`` columns."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def groups(self, in_features: int) -> int:
        """Number of groups in a row of ``in_features`` columns.

        Raises:
            SchemeError: ``group_size`` does not divide ``in_features``; the remedy names sizes that do.
        """
        size = self.columns_per_group(in_features)
        if in_features % size:
            sizes = ", ".join([*map(str, dividing_group_sizes(in_features)), "-1 (one scale per channel)"])
            raise SchemeError(
                f"group_size {size} does not divide the {in_features} input columns",
                f"sizes that do: {sizes}",
            )
        return in_features // size

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight: code, and this group's share of scale and zero point."""
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + (scale_bits + zero_bits) / self.columns_per_group(in_features)

    def describe(self) -> str:
        """A short name, such as ``int4 g64 sym``."""
        group = "channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        return f"int{self.bits} {group} {'sym' if self.symmetric else 'asym'}"


def dividing_group_sizes(in_features: int) -> list[int]:
    """Group sizes of common kernels that divide ``in_features``, or else the nearest to 64 that do; may be none."""
    common = [size for size in (128, 64, 32, 256, 16) if in_features % size == 0]
    others = [size for size in range(8, min(in_features - 1, 512) + 1) if in_features % size == 0]
    return common or sorted(others, key=lambda size: abs(size - 64))[:8]


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """What a method returns for one weight, and all that a format needs to store it.

    Attributes:
        scheme: the grid.
        codes: uint8 ``[out_features, in_features]``, each in ``0 .. 2**bits - 1``.
        scales: ``[out_features, groups]`` in the dtype in which they will be stored.
        zeros: uint8 ``[out_features, groups]``; all ``2**(bits - 1)`` when symmetric.
    """

    scheme: IntScheme
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``(codes - zeros) * scales`` as ``[out_features, in_features]``, computed in ``dtype``.

        Without a ``dtype``, in the dtype of the scales, as runtimes do.
        """
        dtype = dtype or self.scales.dtype
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, self.scales.shape[1], -1).to(dtype)
        grouped = grouped - self.zeros.to(dtype).unsqueeze(-1)
        return grouped.mul_(self.scales.to(dtype).unsqueeze(-1)).view(rows, columns)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The rows ``start .. stop - 1``, for layers that were solved stacked."""
        return replace(self, codes=self.codes[start:stop], scales=self.scales[start:stop], zeros=self.zeros[start:stop])

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on another device."""
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), zeros=self.zeros.to(device))
