"""A quantized weight: codes, scales, and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from quantkit.schemes.base import Scheme

if TYPE_CHECKING:
    import torch

BY_COLUMN = ("g_idx", "importance")
"""The parts that belong to the columns of a weight and not to its rows."""


class Decodable(Protocol):
    """What every packed layer that quantkit reads can tell, whatever its codes stand for."""

    @property
    def scheme(self) -> Scheme:
        """Which numbers its weights can be."""

    @property
    def scales(self) -> torch.Tensor:
        """Its scales, of any shape, in the dtype in which weights are decoded."""

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights, ``[out_features, in_features]``, computed in ``dtype`` or else in that of the scales."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """What a method returns for one weight, and all that a format needs to store it.

    Attributes:
        scheme: the grid.
        codes: uint8 ``[out_features, in_features]``, each below ``2**bits``; E4M3 numbers by their bits.
        scales: the scale of each group of weights, in the dtype in which weights are decoded:
            ``[out_features, groups]``, or ``[groups, 1]`` where an integer scheme groups along axis 0.
        zeros: like ``scales``; uint8 for whole zero points, all ``2**(bits - 1)`` when symmetric and 0 where levels
            are not integers; in the dtype of the scales where zero points are floats.
        parts: the pieces of which a compound scale is made, as the scheme stores them, see its grids; ``g_idx``,
            int32 ``[in_features]``, the group of each column where groups do not gather neighbours; ``importance``,
            float32 ``[in_features]``, the mean square of each input where a format stores it.
    """

    scheme: Scheme
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``level * scale`` of each code as ``[out_features, in_features]``, computed in ``dtype``.

        Without a ``dtype``, in the dtype of the scales, as runtimes do.
        """
        dtype = dtype or self.scales.dtype
        grids = self.scheme.grids()
        order = self.parts["g_idx"].argsort(stable=True) if "g_idx" in self.parts else None
        codes = self.codes if order is None else self.codes[:, order]
        groups = grids.levels(grids.grouped(codes), self.zeros, dtype)
        found = grids.ungrouped(groups.mul_(self.scales.to(dtype).unsqueeze(-1)), codes.shape)
        return found if order is None else found[:, order.argsort()]

    def check(self) -> None:
        """Check that codes, scales, zero points and the parts that belong to columns fit each other.

        Raises:
            ValueError: they do not.
        """
        if self.codes.ndim != 2:
            raise ValueError(f"its codes have the shape {list(self.codes.shape)}")
        wanted = self.scheme.grids().grouped(self.codes).shape[:-1]
        for name, found in (("scales", self.scales), ("zero points", self.zeros)):
            if found.shape != wanted:
                raise ValueError(f"its {name} have the shape {list(found.shape)} and not {list(wanted)}")
        for name in BY_COLUMN:
            if name in self.parts and self.parts[name].shape != self.codes.shape[1:]:
                raise ValueError(f"its {name} is not one number for each of {self.codes.shape[1]} columns")

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The rows ``start .. stop - 1``, for layers that were solved as one; the scheme must stack."""
        if start == 0 and stop == self.codes.shape[0]:
            return self
        if not self.scheme.stacks:
            raise ValueError(f"the rows of a {self.scheme.describe()} weight share scales")
        rows = self.codes.shape[0]
        parts = {
            name: part[start:stop] if name not in BY_COLUMN and part.shape[0] == rows else part
            for name, part in self.parts.items()
        }
        return replace(
            self,
            codes=self.codes[start:stop],
            scales=self.scales[start:stop],
            zeros=self.zeros[start:stop],
            parts=parts,
        )

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on another device."""
        parts = {name: part.to(device) for name, part in self.parts.items()}
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=self.zeros.to(device),
            parts=parts,
        )
