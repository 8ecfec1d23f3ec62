"""Additive codebooks: a group of weights is a sum of vectors, one out of each of some codebooks.

Those of AQLM (Egiazarian et al. 2024, arXiv:2401.06118). Its codes belong to groups of weights, so that neither a level
per weight nor a grid tells them, and quantkit has no method that chooses them: it reads files that hold some.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quantkit.errors import SchemeError
from quantkit.schemes.base import PER_CHANNEL, Scheme

if TYPE_CHECKING:
    import torch

WIDEST = 16
"""Bits of the widest code: a codebook of 65,536 vectors, which AQLM's best checkpoints have."""


@dataclass(frozen=True, slots=True)
class AdditiveScheme(Scheme):
    """Groups of weights as sums of vectors, and one scale for each row of groups.

    Args:
        codebooks: vectors that are added for a group.
        code_bits: width of a code; a codebook has ``2**code_bits`` vectors.
        in_group: input columns of a group.
        out_group: output rows of a group.
    """

    kind: ClassVar[str] = "aqlm"
    summary: ClassVar[str] = "sums of vectors out of learned codebooks"
    source: ClassVar[str] = "Egiazarian et al. 2024, arXiv:2401.06118"

    codebooks: int = 1
    code_bits: int = WIDEST
    in_group: int = 8
    out_group: int = 1

    def __post_init__(self) -> None:
        for name in self.defaults():
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise SchemeError(f"{self.kind} cannot have {value!r} for {name}", "it is a whole number from 1 on")
        if self.code_bits > WIDEST:
            raise SchemeError(f"{self.kind} cannot have codes of {self.code_bits} bits", f"{WIDEST} is the most")

    @property
    def bits(self) -> int:
        """Width of a code, which stands for a whole group."""
        return self.code_bits

    @property
    def group_size(self) -> int:
        """One scale for each row of groups."""
        return PER_CHANNEL

    @property
    def stacks(self) -> bool:
        """A layer's codebooks are its own."""
        return False

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """Codes, and each weight's share of scales and codebooks, which are as wide as scales."""
        group = self.in_group * self.out_group
        codes = self.codebooks * self.code_bits / group + scale_bits / (in_features * self.out_group)
        if out_features is None:
            return codes
        return codes + self.codebooks * (1 << self.code_bits) * group * scale_bits / (in_features * out_features)

    def describe(self) -> str:
        """As its authors call it, such as ``aqlm 1x16 g8``: codebooks, bits of a code, weights of a group."""
        rows = "" if self.out_group == 1 else f"{self.out_group}x"
        return f"{self.kind} {self.codebooks}x{self.code_bits} g{rows}{self.in_group}"


@dataclass(frozen=True, slots=True)
class AdditiveWeight:
    """A weight of such a scheme, as a file holds it.

    Attributes:
        scheme: the scheme.
        codes: whole numbers, ``[out_groups, in_groups, codebooks]``, modulo the vectors of a codebook.
        codebooks: floats, ``[codebooks, 2**code_bits, out_group, in_group]``.
        scales: floats, ``[out_groups, 1, 1, 1]``.
    """

    scheme: AdditiveScheme
    codes: torch.Tensor
    codebooks: torch.Tensor
    scales: torch.Tensor

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The sum of each group's vectors times its scale, ``[out_features, in_features]``, computed in ``dtype``.

        Without a ``dtype``, in the dtype of the scales.
        """
        dtype = dtype or self.scales.dtype
        (down, across, _), (_, size, rows, columns) = self.codes.shape, self.codebooks.shape
        places = self.codes.long().remainder_(size)
        total = self.codebooks[0].to(dtype)[places[..., 0]]
        for number in range(1, len(self.codebooks)):
            total += self.codebooks[number].to(dtype)[places[..., number]]
        return total.mul_(self.scales.to(dtype)).transpose(1, 2).reshape(down * rows, across * columns)
