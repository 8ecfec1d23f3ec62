"""The grids of GGML's block types: the K-quants with scales of super-blocks, and IQ4_NL with a table of levels.

A super-block of a K-quant has a float16 scale ``d``, and with minima a ``dmin``; a sub-block's scale is ``d`` times a
whole number, and what it takes off is ``dmin`` times another. So the scales of a super-block are chosen together, see
:mod:`quantkit.schemes.grids.super_blocks`, and refitted together, see :mod:`quantkit.schemes.grids.super_block_refit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from quantkit.errors import QuantizationError
from quantkit.schemes.base import Scheme
from quantkit.schemes.ggml import GgmlScheme, Iq4NlScheme
from quantkit.schemes.grids.base import Grid, Grids, Rounder, stored
from quantkit.schemes.grids.fixed import TINY, TableGrids
from quantkit.schemes.grids.integer import Limits, Shifted
from quantkit.schemes.grids.super_block_refit import refit
from quantkit.schemes.grids.super_blocks import Steps, candidates, fit, joined, rounded_steps, spanning
from quantkit.system.host import decide

CHUNK = 1 << 18
"""Weights fitted at a time: few enough for the caches, enough that threads seldom wait for each other."""


class KQuantGrids(Grids):
    """Levels ``code - zero``; with minima zeros are floats.

    ``parts`` of a grid holds ``scale``, float16 ``[rows, super-blocks]``, and ``scale_steps``, int8 ``[rows, groups]``,
    whose product is a group's scale; with minima ``minimum`` and ``minimum_steps`` likewise. No scale is zero.
    """

    scheme: GgmlScheme

    def __init__(self, scheme: Scheme) -> None:
        if not isinstance(scheme, GgmlScheme):
            raise TypeError(f"{scheme.describe()} has no super-blocks")
        super().__init__(scheme)
        self.scheme = scheme
        self.last = (1 << scheme.bits) - 1

    @property
    def independent(self) -> bool:
        """Sub-blocks share what their scales are multiples of."""
        return False

    def levels(self, codes: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``code - zero``, computed in ``dtype``."""
        return codes.to(dtype) - zeros.to(dtype).unsqueeze(-1)

    def codes(self, levels: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """``level + zero``."""
        return (levels + zeros).round_().to(torch.uint8)

    def nearest_(self, values: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Round where the codes are whole, and clamp to those that there are."""
        zero = zeros.unsqueeze(-1)
        return values.add_(zero).round_().clamp_(0, self.last).sub_(zero)

    def encode(self, groups: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The nearest codes; of two equally near the even one."""
        codes = (groups / grid.scales.unsqueeze(-1)).add_(grid.zeros.unsqueeze(-1))
        return codes.round_().clamp_(0, self.last).to(torch.uint8)

    def spanning(self, groups: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """The range of each group, zero included, in whole steps of the largest scale of the super-block."""
        return self.held(self.grid(rounded_steps(self.scheme, *spanning(self.scheme, groups))))

    def candidates(
        self, groups: torch.Tensor, count: int, *, negative_scales: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Scales and zeros of ranges from the full one down, before they are rounded to whole steps."""
        tried = candidates(self.scheme, groups, count)
        return [(scale, self._zeros(scale, minimum)) for scale, minimum in tried]

    def searched(self, groups: torch.Tensor, weigh: Callable[[torch.Tensor], torch.Tensor], count: int) -> Grid | None:
        """Scales and minima of least weighted error, rounded to whole steps together."""
        per_row = groups.shape[1] * groups.shape[2]
        rows = max(1, CHUNK // per_row) if groups.device.type == "cpu" else groups.shape[0]
        fits = [fit(self.scheme, part, weigh, count) for part in torch.split(groups, rows)]
        return self.held(self.grid(joined(fits)))

    def refitted(
        self, weight: torch.Tensor, levels: torch.Tensor, grid: Grid, hessian: torch.Tensor
    ) -> tuple[torch.Tensor, Grid] | None:
        """Scales of super-blocks and whole steps that suit the codes better; see :meth:`Grids.refitted`."""
        columns, rows = weight.shape
        codes = (levels + self.spread(grid.zeros, rows, columns)).round_()
        found = self.grid(refit(self.scheme, weight, codes, self.steps(grid.parts), hessian))
        return codes.sub_(self.spread(found.zeros, rows, columns)), found

    def rounded(self, scales: torch.Tensor, zeros: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """The nearest whole steps of the largest scale, and the largest minimum, of each super-block."""
        minima = (zeros * scales).clamp_(min=0) if self.scheme.minima else None
        return self.grid(rounded_steps(self.scheme, scales, minima))

    def stored_zeros(self, grid: Grid) -> torch.Tensor:
        """Float32 where there are minima, else uint8."""
        return grid.zeros if self.scheme.minima else grid.zeros.to(torch.uint8)

    def reach(self, grid: Grid) -> torch.Tensor:
        """The farther of the lowest and the highest level, in units of the weights."""
        return torch.maximum(grid.zeros.abs(), (self.last - grid.zeros).abs()) * grid.scales.abs()

    def held(self, grid: Grid) -> Grid:
        """The grid itself.

        Raises:
            QuantizationError: a scale of a super-block is beyond float16.
        """
        _require_half([grid.parts[name] for name in HALVES if name in grid.parts], self.scheme)
        return super().held(grid)

    def rounder(self, grid: Grid, rows: int, columns: int) -> Rounder:
        """Limits that are the same for all, or with minima zeros of each weight."""
        if not self.scheme.minima:
            return Limits(-self.scheme.zero, self.last - self.scheme.zero)
        return Shifted(self.spread(grid.zeros, rows, columns), self.last)

    def steps(self, parts: Mapping[str, torch.Tensor]) -> Steps:
        """The pieces of a grid's scales, of its parts."""
        minimum, minimum_steps = (parts[name].float() if name in parts else None for name in MINIMA)
        return Steps(parts["scale"].float(), minimum, parts["scale_steps"].float(), minimum_steps)

    def grid(self, steps: Steps) -> Grid:
        """The grid of pieces, with the numbers that its blocks decode to."""
        scales, minima = steps.scales(), steps.minima()
        parts = {"scale": steps.scale.half(), "scale_steps": steps.scale_steps.to(torch.int8)}
        if steps.minimum is not None and steps.minimum_steps is not None:
            parts |= {"minimum": steps.minimum.half(), "minimum_steps": steps.minimum_steps.to(torch.int8)}
        return Grid(scales, self._zeros(scales, minima), parts)

    def _zeros(self, scales: torch.Tensor, minima: torch.Tensor | None) -> torch.Tensor:
        return torch.full_like(scales, self.scheme.zero) if minima is None else minima / scales


HALVES = ("scale", "minimum")
"""The parts in float16, one a super-block."""
MINIMA = ("minimum", "minimum_steps")
"""The parts that tell the minima."""


def _require_half(values: Sequence[torch.Tensor], scheme: GgmlScheme) -> None:
    """Refuse numbers that float16 does not hold."""
    if not decide(torch.stack([each.isfinite().all() for each in values]).all()):
        raise QuantizationError(
            f"a weight is not finite or needs a scale beyond the range of float16, which {scheme.ggml_type} stores",
            "keep this layer float with 'ignore'",
        )


class Iq4NlGrids(TableGrids):
    """The table of IQ4_NL, whose levels reach further below zero: a scale may be negative."""

    narrowest = 0.7

    def __init__(self, scheme: Scheme) -> None:
        if not isinstance(scheme, Iq4NlScheme):
            raise TypeError(f"{scheme.describe()} has not the levels of IQ4_NL")
        super().__init__(scheme)

    def spanning(self, groups: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """The weight of largest magnitude on the level of largest magnitude."""
        scales = self._full(groups)
        return self.stored(scales, torch.zeros_like(scales), scale_dtype)

    def candidates(
        self, groups: torch.Tensor, count: int, *, negative_scales: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Scales of ranges from the full one down, the far side of the levels on that of the largest weight."""
        full = self._full(groups)
        full = torch.where(full.isfinite(), full, torch.nan)
        full = torch.where(full.abs() < TINY, TINY, full)
        shrinks = [1 - (1 - self.narrowest) * index / max(1, count - 1) for index in range(count)]
        return [(full * shrink, torch.zeros_like(full)) for shrink in shrinks]

    def rounded(self, scales: torch.Tensor, zeros: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """Scales rounded to float16, in which blocks have them, as float32."""
        return Grid(stored(scales, torch.float16).float(), zeros)

    def held(self, grid: Grid) -> Grid:
        """The grid itself.

        Raises:
            QuantizationError: a scale is beyond float16.
        """
        _require_half([grid.scales], Iq4NlScheme())
        return super().held(grid)

    def _full(self, groups: torch.Tensor) -> torch.Tensor:
        low, high = groups.amin(-1), groups.amax(-1)
        return -torch.where(-low >= high, low, high) / self.highest
