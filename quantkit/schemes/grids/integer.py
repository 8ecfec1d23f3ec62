"""The grids of integer schemes: levels are ``code - zero``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch

from quantkit.schemes.grids.base import Grid, Grids, Rounder, stored
from quantkit.schemes.integer import IntScheme

NARROWEST = {1: 0.4, 2: 0.45, 3: 0.6, 4: 0.7, 5: 0.8, 6: 0.88, 7: 0.93, 8: 0.96}
"""By bits, the narrowest range that is tried, as a share of the full one: fewer bits clip more."""
TINY = 4 * torch.finfo(torch.float32).tiny
"""The smallest scale that is tried: its narrowest candidate is a normal number still."""
FARTHEST = 1024
"""The largest float zero, for a group far from level zero: beyond it float16 holds no halves."""


class IntGrids(Grids):
    """Integer levels with the code of zero fixed, whole or, on request, any number."""

    scheme: IntScheme

    def grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """``[rows, columns]`` in groups; along axis 0 they are ``[groups, 1, group_size]``."""
        if self.scheme.axis == 0:
            return weight.reshape(self.scheme.group_size, -1).T.unsqueeze(1)
        return super().grouped(weight)

    def ungrouped(self, groups: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The inverse of :meth:`grouped`."""
        return groups.squeeze(1).T.reshape(shape) if self.scheme.axis == 0 else super().ungrouped(groups, shape)

    def column_weights(self, importance: torch.Tensor | None, columns: int, device: torch.device) -> torch.Tensor:
        """Along axis 0 a group lies in one column, so that all its weights count alike."""
        return super().column_weights(None if self.scheme.axis == 0 else importance, columns, device)

    def spread(self, values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """``[A, G]`` to ``[columns, rows]``."""
        if self.scheme.axis == 0:
            return values.T.expand(self.scheme.group_size, -1).reshape(rows, columns).T.contiguous()
        return super().spread(values, rows, columns)

    @property
    def _limits(self) -> tuple[int, int]:
        """Lowest and highest level of a symmetric scheme."""
        return -self.scheme.zero, self.scheme.levels - 1 - self.scheme.zero

    @property
    def independent(self) -> bool:
        """Along axis 0 groups are no neighbouring columns."""
        return self.scheme.axis != 0

    def levels(self, codes: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``code - zero``, computed in ``dtype``."""
        return codes.to(dtype) - zeros.to(dtype).unsqueeze(-1)

    def codes(self, levels: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """``level + zero``."""
        return (levels + zeros).round_().to(torch.uint8)

    def nearest_(self, values: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Round, and clamp to the codes that there are."""
        if self.scheme.symmetric:
            return values.round_().clamp_(*self._limits)
        zero = zeros.unsqueeze(-1)
        if self.scheme.zeros == "float":
            return values.add_(zero).round_().clamp_(0, self.scheme.levels - 1).sub_(zero)
        return values.round_().clamp_(-zero, self.scheme.levels - 1 - zero)

    def encode(self, groups: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The nearest codes; of two equally near the even one.

        A whole zero is added as a signed number, as compressed-tensors does, so that near ties round as there.
        """
        return self._codes(groups, grid).to(torch.uint8)

    def through(self, groups: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Weights coded and decoded, without bytes in between."""
        if self.scheme.symmetric:
            scales = grid.scales.float().unsqueeze(-1)
            return (groups / scales).round_().clamp_(*self._limits).mul_(scales)
        return self._codes(groups, grid).sub_(grid.zeros.unsqueeze(-1)).mul_(grid.scales.float().unsqueeze(-1))

    def _codes(self, groups: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The nearest codes, whole float32."""
        shift = 0 if self.scheme.zeros == "float" else self.scheme.zero
        codes = (groups / grid.scales.float().unsqueeze(-1)).add_((grid.zeros - shift).unsqueeze(-1))
        return codes.round_().add_(shift).clamp_(0, self.scheme.levels - 1)

    def spanning(self, groups: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """The grid that just spans each group's range, zero included: round-to-nearest's usual choice.

        Symmetric: ``scale = 2 max|w| / (2**bits - 1)``; asymmetric: ``(max - min) / (2**bits - 1)``. These are
        the formulas of compressed-tensors' ``calculate_qparams``, so that its quantizer gives the same grid.
        With float zeros the range need not include zero, as in HQQ.
        """
        scheme, last = self.scheme, self.scheme.levels - 1
        low, high = groups.amin(-1), groups.amax(-1)
        if scheme.zeros == "float":
            scales = stored(torch.maximum((high - low) / last, _least_scale(low, high)), scale_dtype)
            return self.held(Grid(scales, (-low / scales.float()).to(scale_dtype).float()))
        low.clamp_(max=0)
        high.clamp_(min=0)
        if scheme.symmetric:
            scales = stored(torch.maximum(-low, high) / (last / 2), scale_dtype)
            return self.held(Grid(scales, torch.full_like(low, scheme.zero)))
        scales = stored((high - low) / last, scale_dtype)
        # The sum is taken of signed zeros, as compressed-tensors does, so that near ties round alike.
        zeros = (-scheme.zero - low / scales.float()).round_().add_(scheme.zero).clamp_(0, last)
        return self.held(Grid(scales, zeros))

    def candidates(
        self, groups: torch.Tensor, count: int, *, negative_scales: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Scales and zeros of ranges from the full one down.

        With ``negative_scales`` a symmetric grid, which reaches one step further on one side, is turned so that
        this side is that of the weight of largest magnitude; not where activations are rounded too, as kernels for
        that may read scales as unsigned. Ranges shrink towards zero, with float zeros towards their middle.
        """
        scheme, last = self.scheme, self.scheme.levels - 1
        narrowest = NARROWEST[scheme.bits]
        shrinks = [1 - (1 - narrowest) * index / max(1, count - 1) for index in range(count)]
        low, high = groups.amin(-1), groups.amax(-1)
        if scheme.symmetric:
            zero = torch.full_like(low, scheme.zero)
            if negative_scales and scheme.activations is None:
                full = -torch.where(-low >= high, low, high) / scheme.zero
            else:
                full = torch.maximum(-low / scheme.zero, high / (scheme.zero - 1))
            full = torch.where(full.abs() < TINY, TINY, full)
            return [(full * shrink, zero) for shrink in shrinks]
        if scheme.zeros == "float":
            return [self._about_middle(low, high, shrink) for shrink in shrinks]
        low.clamp_(max=0)
        high.clamp_(min=0)
        found = []
        for shrink in shrinks:
            scale = ((high - low) * (shrink / last)).clamp_(min=TINY)
            found.append((scale, (-low * shrink / scale).round_().clamp_(0, last)))
        return found

    def neighbours(self, scales: torch.Tensor, zeros: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The best scales with the whole zeros next to the best ones (NeUQI, arXiv:2505.17595, tries every zero)."""
        if self.scheme.symmetric or self.scheme.zeros == "float":
            return []
        return [(scales, (zeros + step).clamp_(0, self.scheme.levels - 1)) for step in (-1, 1)]

    def _about_middle(self, low: torch.Tensor, high: torch.Tensor, shrink: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and float zero of a range shrunk towards its middle."""
        width = high - low
        scale = (width * (shrink / (self.scheme.levels - 1))).maximum(_least_scale(low, high)).clamp_(min=TINY)
        return scale, -(low + width * ((1 - shrink) / 2)) / scale

    def rounded(self, scales: torch.Tensor, zeros: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """Scales rounded to ``scale_dtype``, and float zeros too."""
        zeros = zeros.to(scale_dtype).float() if self.scheme.zeros == "float" else zeros
        return Grid(stored(scales, scale_dtype), zeros)

    def stored_zeros(self, grid: Grid) -> torch.Tensor:
        """uint8, or float zeros in the dtype of the scales."""
        return grid.zeros.to(grid.scales.dtype if self.scheme.zeros == "float" else torch.uint8)

    def reach(self, grid: Grid) -> torch.Tensor:
        """The farther of the lowest and the highest level, in units of the weights."""
        farther = torch.maximum(grid.zeros.abs(), ((self.scheme.levels - 1) - grid.zeros).abs())
        return farther * grid.scales.float().abs()

    def rounder(self, grid: Grid, rows: int, columns: int) -> Rounder:
        """Limits of each weight; a symmetric scheme has the same for all."""
        last = self.scheme.levels - 1
        if self.scheme.symmetric:
            return Limits(*self._limits)
        zeros = self.spread(grid.zeros, rows, columns)
        return Shifted(zeros, last) if self.scheme.zeros == "float" else Limits(-zeros, last - zeros)


def _least_scale(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The least scale at which a float zero is no farther off than it may be."""
    return torch.maximum(-low, high).div_(FARTHEST)


@dataclass(frozen=True, slots=True)
class Limits:
    """Lowest and highest level of each weight of a transposed layer: numbers, or float32 ``[columns, rows]``."""

    low: torch.Tensor | int
    high: torch.Tensor | int

    def columns(self) -> Iterator[tuple[Any, Any]]:
        """The limits of each column in turn."""
        low = self.low.unbind(0) if isinstance(self.low, torch.Tensor) else repeat(self.low)
        high = self.high.unbind(0) if isinstance(self.high, torch.Tensor) else repeat(self.high)
        return zip(low, high, strict=False)

    def nearest_(self, values: torch.Tensor, column: tuple[Any, Any]) -> None:
        """Round and clamp."""
        values.round_().clamp_(*column)

    def ordered(self, order: torch.Tensor) -> Limits:
        """The limits with the columns in another order."""
        if isinstance(self.low, torch.Tensor) and isinstance(self.high, torch.Tensor):
            return Limits(self.low[order], self.high[order])
        return self

    def beside(self, others: Sequence[Limits]) -> Limits:
        """The limits of layers that are alike, float32 ``[columns, layers, rows]``; numbers are the same for all."""
        return Limits(*(_beside([getattr(each, end) for each in (self, *others)]) for end in ("low", "high")))


def _beside(ends: Sequence[torch.Tensor | int]) -> torch.Tensor | int:
    tensors = [each for each in ends if isinstance(each, torch.Tensor)]
    return torch.stack(tensors, 1) if tensors else ends[0]


@dataclass(frozen=True, slots=True)
class Shifted:
    """Levels that lie between the whole numbers: ``code - zero`` with float zeros, ``[columns, rows]``."""

    zeros: torch.Tensor
    last: int

    def columns(self) -> Iterator[torch.Tensor]:
        """The zeros of each column in turn."""
        return iter(self.zeros.unbind(0))

    def nearest_(self, values: torch.Tensor, column: torch.Tensor) -> None:
        """Round where the codes are whole."""
        values.add_(column).round_().clamp_(0, self.last).sub_(column)

    def ordered(self, order: torch.Tensor) -> Shifted:
        """The zeros with the columns in another order."""
        return Shifted(self.zeros[order], self.last)

    def beside(self, others: Sequence[Shifted]) -> Shifted:
        """The zeros of layers that are alike, ``[columns, layers, rows]``."""
        return Shifted(torch.stack([each.zeros for each in (self, *others)], 1), self.last)
