"""What the grids of a scheme are: the levels that codes stand for, and the scales that can be stored.

Weights come in groups, ``[A, G, S]``: ``S`` weights that share a scale, of which there is one per group,
``[A, G]``. For all but an integer scheme along axis 0 the groups are ``[rows, groups, columns_per_group]``.
The solvers work on the transposed layer, ``[columns, rows]``, so that a column is contiguous.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Protocol

import torch

from quantkit.errors import QuantizationError
from quantkit.schemes.base import Scheme
from quantkit.system.host import decide


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales in the dtype in which weights are decoded, and zeros as float32; ``[A, G]``.

    Attributes:
        scales: the scale of each group.
        zeros: the code of level zero; 0 where levels are not integers.
        parts: see :class:`quantkit.schemes.weight.QuantizedWeight`.
    """

    scales: torch.Tensor
    zeros: torch.Tensor
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Rounder(Protocol):
    """Finds the nearest levels of a transposed layer, column by column."""

    def columns(self) -> Iterator[Any]:
        """What :meth:`nearest_` must know of each column in turn."""

    def nearest_(self, values: torch.Tensor, column: Any) -> None:
        """Replace float32 values of a column, in units of their scales, by the nearest levels."""

    def ordered(self, order: torch.Tensor) -> Rounder:
        """The same with the columns in another order."""

    def beside(self, others: Sequence[Any]) -> Rounder:
        """The nearest levels of layers that are alike, ``[layers, rows]`` a column: this one's and those of others."""


class Grids(ABC):
    """The grids that one scheme allows: its arithmetic.

    Attributes:
        scheme: the scheme.
        whole: whether the column solver goes through the columns group by group. It chooses the scale of a group best
            where it solves all of it at once, and orders columns best where it takes each by itself.
    """

    whole: bool = False

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """``[rows, columns]`` in groups."""
        rows, columns = weight.shape
        return weight.view(rows, self.scheme.groups(columns), -1)

    def ungrouped(self, groups: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The inverse of :meth:`grouped`."""
        return groups.reshape(shape)

    def column_weights(self, importance: torch.Tensor | None, columns: int, device: torch.device) -> torch.Tensor:
        """Importance per column as a factor of the groups: float32 ``[1, G, S]``.

        Where it is None, or vanishes over a whole group, all weights of the group count alike.
        """
        if importance is None:
            return torch.ones(1, 1, 1, device=device)
        found = self.grouped(importance.float().unsqueeze(0))
        return torch.where(found.amax(-1, keepdim=True) > 0, found, 1.0)

    @abstractmethod
    def levels(self, codes: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The levels of codes, as a new tensor of ``dtype``.

        Args:
            codes: uint8 ``[A, G, S]``.
            zeros: ``[A, G]``.
            dtype: of the result.
        """

    @abstractmethod
    def codes(self, levels: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`levels` for float32 levels, uint8."""

    @abstractmethod
    def nearest_(self, values: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Replace ``values``, float32 ``[A, G, S]`` in units of their scales, by the nearest levels."""

    @abstractmethod
    def encode(self, groups: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The nearest codes of weights, uint8 ``[A, G, S]``, ties and rounding as in the scheme's own reference."""

    def through(self, groups: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Weights coded and decoded, float32 ``[A, G, S]``, a new tensor."""
        levels = self.levels(self.encode(groups, grid), grid.zeros, torch.float32)
        return levels.mul_(grid.scales.float().unsqueeze(-1))

    @abstractmethod
    def spanning(self, groups: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """The grid that just spans the range of each group, as the scheme's own reference computes it.

        Raises:
            QuantizationError: the grid reaches beyond what its dtype holds.
        """

    @abstractmethod
    def candidates(
        self, groups: torch.Tensor, count: int, *, negative_scales: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Scales and zeros to try, each ``[A, G]`` float32.

        Where scales are not free they are already among those that can be stored.
        """

    def neighbours(self, scales: torch.Tensor, zeros: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Scales and zeros to try beside the best candidates, each ``[A, G]`` float32."""
        return []

    def fitted(self, groups: torch.Tensor) -> Grids:
        """The grids of one weight: where all scales have a part in common, those with this part.

        Args:
            groups: of the whole weight.

        Raises:
            QuantizationError: the weight is not finite.
        """
        return self

    @property
    def independent(self) -> bool:
        """Whether each group of neighbouring columns of a row has a scale that does not depend on those of others."""
        return True

    def pooled(self, gains: torch.Tensor) -> torch.Tensor:
        """What groups gain by a candidate, ``[A, G]``: for each the sum over all that share its scale."""
        return gains

    def searched(self, groups: torch.Tensor, weigh: Callable[[torch.Tensor], torch.Tensor], count: int) -> Grid | None:
        """The grid of least weighted error by a search of the scheme's own; None where groups are searched one by one.

        Args:
            groups: float32 ``[A, G, S]``.
            weigh: gives ``groups @ H`` of any rows of them, a new tensor.
            count: ranges tried per group.
        """
        return None

    def refitted(
        self, weight: torch.Tensor, levels: torch.Tensor, grid: Grid, hessian: torch.Tensor
    ) -> tuple[torch.Tensor, Grid] | None:
        """Levels of the same codes on a grid that suits them better; None where the scheme has no refit of its own.

        Args:
            weight: float32 ``[columns, rows]``.
            levels: float32 ``[columns, rows]``.
            grid: on which they lie.
            hessian: float32 ``[columns, columns]``, by which the error of a row is told.
        """
        return None

    @abstractmethod
    def rounded(self, scales: torch.Tensor, zeros: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """The grid with float32 scales rounded to what the scheme stores."""

    @abstractmethod
    def reach(self, grid: Grid) -> torch.Tensor:
        """The largest magnitude on the grid of each group, float32 ``[A, G]``."""

    def stored(self, scales: torch.Tensor, zeros: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """The grid with float32 scales rounded to what the scheme stores.

        Raises:
            QuantizationError: the grid reaches beyond what its dtype holds.
        """
        return self.held(self.rounded(scales, zeros, scale_dtype))

    def held(self, grid: Grid) -> Grid:
        """The grid itself.

        Raises:
            QuantizationError: it reaches beyond what its dtype holds.
        """
        require_held(self.reach(grid), grid.scales.dtype)
        return grid

    @abstractmethod
    def rounder(self, grid: Grid, rows: int, columns: int) -> Rounder:
        """The nearest levels of a transposed layer."""

    def spread(self, values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """``[A, G]`` to ``[columns, rows]``: the value of each weight, transposed."""
        return values.T.repeat_interleave(columns // values.shape[1], dim=0)

    def stored_zeros(self, grid: Grid) -> torch.Tensor:
        """Zeros as a quantized weight holds them."""
        return grid.zeros.to(torch.uint8)


class Uniform:
    """A rounder whose columns are all alike.

    Attributes:
        grids: whose levels it finds.
    """

    def __init__(self, grids: Grids) -> None:
        self.grids = grids
        self._zeros = torch.zeros(1, 1)

    def columns(self) -> Iterator[Any]:
        """Nothing differs from column to column."""
        return repeat(None)

    def nearest_(self, values: torch.Tensor, column: Any) -> None:
        """Replace values by the nearest levels."""
        self.grids.nearest_(values, self._zeros)

    def ordered(self, order: torch.Tensor) -> Uniform:
        """The same."""
        return self

    def beside(self, others: Sequence[Uniform]) -> Uniform:
        """The same."""
        return self


def stored(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales rounded to the dtype in which they are stored; where they vanish, the smallest number to divide by.

    A group of zeros has scale zero, and one of tiny weights may underflow to it; dividing by it must not
    give NaN. float16 keeps its subnormal numbers, which an 8-bit scale needs as soon as a group stays below
    0.008; those of the other dtypes are subnormal in float32 too, where hardware may flush them to zero.
    """
    rounded = scales.to(dtype)
    info = torch.finfo(dtype)
    least = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)
    return torch.where(rounded.abs() < least, least, rounded)


def require_held(reach: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse a grid whose values a runtime would compute as infinities.

    Args:
        reach: the largest magnitude of each cell's values.
        dtype: in which they are computed.

    Raises:
        QuantizationError: one is beyond it, or not a number.
    """
    largest = torch.finfo(dtype).max
    if not decide((reach <= largest).all()):
        name = str(dtype).removeprefix("torch.")
        raise QuantizationError(
            f"a weight is not finite or needs a scale beyond the range of {name} (its largest value is {largest:g})",
            "set model.dtype to bfloat16 or float32, whose scales reach further" if name == "float16" else "",
        )
