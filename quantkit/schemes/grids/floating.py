"""The grids of FP8: E4M3 levels, with scales of a tensor, a channel or a block of 128 x 128 weights.

Scales and codes are those that the compressed-tensors package (``calculate_qparams``, ``quantize``) gives for the
same weight in float32: the largest magnitude over 448, and the machine epsilon of their dtype where that rounds to
zero; codes are the quotient clamped to 448 and cast, ties to even. A weight below zero that rounds to zero keeps its
sign. llm-compressor runs the same formulas in the dtype of a bfloat16 checkpoint, where a quotient is rounded twice
and a few codes fall to a neighbour.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from quantkit.schemes.floating import BLOCK, Fp8Scheme
from quantkit.schemes.grids.base import Grid
from quantkit.schemes.grids.fixed import FixedGrids

HIGHEST = 448.0
TINY = 4 * torch.finfo(torch.float32).tiny
"""The smallest scale that a search tries: its reciprocal is finite."""


class Fp8Grids(FixedGrids):
    """E4M3 numbers; the scales of a tensor or block are repeated for each row and group.

    The last groups of a row are padded with zeros where blocks do not divide its columns.

    Attributes:
        least_power: the power of two from which on levels have all their bits.
        rounds_at_one: what rounds values between 1 and 2, to eighths, when it is added and taken away.
    """

    scheme: Fp8Scheme
    highest = HIGHEST
    least_power = 2.0**-6
    rounds_at_one = 1.5 * 2**20

    @property
    def independent(self) -> bool:
        """Rows share the scales of tensors and blocks."""
        return self.scheme.granularity == "channel"

    def grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """``[rows, groups, columns_per_group]``."""
        rows, columns = weight.shape
        short = -columns % self.scheme.columns_per_group(columns)
        return (pad(weight, (0, short)) if short else weight).reshape(rows, self.scheme.groups(columns), -1)

    def ungrouped(self, groups: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The inverse of :meth:`grouped`."""
        return groups.reshape(shape[0], -1)[:, : shape[1]].contiguous()

    def spread(self, values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """``[rows, groups]`` to ``[columns, rows]``."""
        return values.T.repeat_interleave(self.scheme.columns_per_group(columns), dim=0)[:columns]

    def levels(self, codes: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Codes are the bits of E4M3 numbers."""
        return codes.view(torch.float8_e4m3fn).to(dtype)

    def codes(self, levels: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """The bits of the E4M3 number."""
        return levels.to(torch.float8_e4m3fn).view(torch.uint8)

    def nearest_(self, values: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Round after clamping to 448; of two equally near the even one."""
        return values.copy_(values.clamp_(-HIGHEST, HIGHEST).to(torch.float8_e4m3fn))

    def encode(self, groups: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The nearest codes; a weight of -0.0 is 0.0, as the package's zero point makes it."""
        scaled = groups / grid.scales.float().unsqueeze(-1)
        return self.codes(scaled.clamp_(-HIGHEST, HIGHEST).add_(0.0), grid.zeros)

    def spanning(self, groups: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """The largest magnitude over 448."""
        scales = self._over_rows(groups.abs().amax(-1), largest=True) / HIGHEST
        return self.stored(scales, torch.zeros_like(scales), scale_dtype)

    def candidates(
        self, groups: torch.Tensor, count: int, *, negative_scales: bool
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Scales from the spanning one up to its double, which only shift weights against the steps of E4M3.

        A range that is narrower would clip and gain nothing: but for the smallest numbers, steps are relative.
        """
        full = (self._over_rows(groups.abs().amax(-1), largest=True) / HIGHEST).clamp_(min=TINY)
        zero = torch.zeros_like(full)
        return [(full * 2 ** (index / count), zero) for index in range(count)]

    def pooled(self, gains: torch.Tensor) -> torch.Tensor:
        """The gain of all groups of a tensor or block, for each of them."""
        return self._over_rows(gains, largest=False)

    def rounded(self, scales: torch.Tensor, zeros: torch.Tensor, scale_dtype: torch.dtype) -> Grid:
        """Scales in ``scale_dtype``."""
        kept = scales.to(scale_dtype)
        return Grid(torch.where(kept == 0, torch.finfo(scale_dtype).eps, kept), zeros)

    def _over_rows(self, values: torch.Tensor, *, largest: bool) -> torch.Tensor:
        """The largest or the sum of ``[rows, groups]`` over the rows that share a scale, repeated for each of them."""
        if self.scheme.granularity == "channel":
            return values
        rows, groups = values.shape
        height = rows if self.scheme.granularity == "tensor" else BLOCK
        blocks = pad(values, (0, 0, 0, -rows % height)).view(-1, height, groups)
        found = blocks.amax(1) if largest else blocks.sum(1)
        return found.repeat_interleave(height, dim=0)[:rows]
