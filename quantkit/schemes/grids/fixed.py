"""Grids whose levels are a fixed set of floats and have no zero point."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from quantkit.schemes.base import Scheme, TableScheme
from quantkit.schemes.grids.base import Grid, Grids, Rounder, Uniform, stored

TINY = 4 * torch.finfo(torch.float32).tiny
EDGE = 0.02
"""Share of a bin that lies between a threshold and the edges, see :class:`_Tables`."""


class FixedGrids(Grids):
    """Levels that are the same for all groups.

    A subclass gives the levels, how the scales are stored, and the shares of the full range that are worth trying.

    Attributes:
        highest: the largest level.
        narrowest: the narrowest range that is tried, as a share of the full one.
    """

    highest: float
    narrowest: float = 0.8

    def candidates(
        self, groups: torch.Tensor, count: int, *, negative_scales: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Scales of ranges from the full one down, as they can be stored; levels are as many on both sides."""
        full = (groups.abs().amax(-1) / self.highest).clamp_(min=TINY)
        # Of an infinite range no candidate would be an improvement; of one that is not a number the first is, and
        # the storing refuses it.
        full = torch.where(full.isfinite(), full, torch.nan)
        zero = torch.zeros_like(full)
        shrinks = [1 - (1 - self.narrowest) * index / max(1, count - 1) for index in range(count)]
        return [(self.localized(full * shrink, full), zero) for shrink in shrinks]

    def localized(self, scales: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        """Scales rounded as :meth:`stored` would, as far as that can be told of each group by itself.

        Args:
            scales: float32 ``[A, G]``.
            full: the scales that span the whole range, from which a scale per tensor follows.
        """
        return scales

    def reach(self, grid: Grid) -> torch.Tensor:
        """The largest level, in units of the weights."""
        return grid.scales.float().abs() * self.highest

    def rounder(self, grid: Grid, rows: int, columns: int) -> Rounder:
        """The same levels everywhere."""
        return Uniform(self)

    @abstractmethod
    def nearest_(self, values: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Replace values by the nearest levels."""


class TableGrids(FixedGrids):
    """Levels from a table by code; a value midway between two levels goes to the lower one.

    Args:
        scheme: a :class:`TableScheme`.
    """

    def __init__(self, scheme: Scheme) -> None:
        if not isinstance(scheme, TableScheme):
            raise TypeError(f"{scheme.describe()} has no table of levels")
        super().__init__(scheme)
        levels = torch.tensor(scheme.table, dtype=torch.float32)
        self._tables = {levels.device: _Tables.of(levels)}
        self.highest = float(levels.abs().max())

    def levels(self, codes: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The table's entries."""
        table = self._on(codes.device).table.to(dtype)
        return table.index_select(0, codes.int().reshape(-1)).view(codes.shape)

    def codes(self, levels: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """The code of each level."""
        return self._coded(levels)

    def nearest_(self, values: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Replace values by the nearest levels; what is not a number goes to some level."""
        tables = self._on(values.device)
        if values.is_contiguous():
            torch.index_select(tables.levels, 0, tables.places(values), out=values.view(-1))
            return values
        return values.copy_(tables.levels.index_select(0, tables.places(values)).view(values.shape))

    def encode(self, groups: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The codes of the levels that are nearest to the quotients."""
        return self._coded(groups / grid.scales.float().unsqueeze(-1))

    def spanning(self, groups: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """The largest magnitude of a group on the level of largest magnitude."""
        scales = groups.abs().amax(-1) / self.highest
        return self.stored(scales, torch.zeros_like(scales), scale_dtype)

    def rounded(self, scales: torch.Tensor, zeros: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """Scales in ``scale_dtype``."""
        return Grid(stored(scales, scale_dtype), zeros)

    def thresholds_and_levels(self, device: torch.device) -> torch.Tensor:
        """The thresholds midway between levels, then the levels, both ascending; float32 ``[2 * levels - 1]``."""
        return self._on(device).ascending

    def _coded(self, values: torch.Tensor) -> torch.Tensor:
        """The codes of the nearest levels, uint8; of a level that occurs twice the lower one."""
        tables = self._on(values.device)
        return tables.codes.index_select(0, tables.places(values)).view(values.shape)

    def _on(self, device: torch.device) -> _Tables:
        """The tables on a device, where they are kept."""
        if device not in self._tables:
            self._tables[device] = next(iter(self._tables.values())).to(device)
        return self._tables[device]


@dataclass(frozen=True, slots=True)
class _Tables:
    """Finds the nearest levels by arithmetic, which takes a fifth of the time of a binary search.

    The line is cut into bins of equal width, so narrow that none holds two thresholds: the bin of a value and one
    comparison with the threshold in it tell the level. No threshold lies near an edge, so that it does not matter
    how the place of a value within a rounding error of an edge is rounded.

    Attributes:
        table: levels by code.
        rate, shift: a value's bin is the whole part of ``rate * value + shift``.
        thresholds: by bin; that of the first is the highest of all, because values beyond the range of an int32
            come out there.
        levels, codes: by place, twice the bin and one more above its threshold.
        ascending: see :meth:`TableGrids.thresholds_and_levels`.
    """

    table: torch.Tensor
    rate: float
    shift: torch.Tensor
    thresholds: torch.Tensor
    levels: torch.Tensor
    codes: torch.Tensor
    ascending: torch.Tensor

    @classmethod
    def of(cls, table: torch.Tensor) -> _Tables:
        """Tables for levels by code, with thresholds midway between them."""
        ascending, codes = _ascending(table)
        thresholds = (ascending[1:] + ascending[:-1]) / 2
        rate = _rate(thresholds)
        shift = 1.5 - rate * float(thresholds[0])
        bins = (thresholds.double() * rate + shift).long()
        count = int(bins[-1]) + 2
        by_bin = torch.zeros(count).index_copy_(0, bins, thresholds)
        by_bin[0] = thresholds[-1]
        below = torch.bucketize(torch.arange(count), bins)
        above = torch.bucketize(torch.arange(count), bins, right=True)
        above[0] = len(thresholds)
        ranks = torch.stack([below, above], 1).flatten()
        whole = torch.cat([thresholds, ascending])
        return cls(table, rate, torch.tensor(shift), by_bin, ascending[ranks], codes[ranks], whole)

    def places(self, values: torch.Tensor) -> torch.Tensor:
        """The places of values, int32 ``[values]``."""
        flat = values.reshape(-1)
        bins = torch.add(self.shift, flat, alpha=self.rate).int().clamp_(0, len(self.thresholds) - 1)
        return torch.add(flat > self.thresholds.index_select(0, bins), bins, alpha=2)

    def to(self, device: torch.device) -> _Tables:
        """The same on another device."""
        kept = self.shift, self.thresholds, self.levels, self.codes, self.ascending
        moved = (each.to(device) for each in kept)
        return _Tables(self.table.to(device), self.rate, *moved)


def _rate(thresholds: torch.Tensor) -> float:
    """Bins per unit, such that each holds at most one threshold, and that away from its edges."""
    places = (thresholds - thresholds[0]).double()
    rate = 1 / float(places.diff().min())
    while bool(((places * rate).frac() - 0.5).abs().lt(EDGE).any()):
        rate *= 1.05
    return rate


def _ascending(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct levels in ascending order, and the lowest code of each, uint8."""
    found: dict[float, int] = {}
    for code, level in enumerate(levels.tolist()):
        found.setdefault(level + 0.0, code)  # -0.0 is 0.0
    ordered = sorted(found)
    return torch.tensor(ordered), torch.tensor([found[level] for level in ordered], dtype=torch.uint8)
