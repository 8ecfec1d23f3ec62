"""AWQ's rounding: each group's range is clipped for the least output error; its factors come from the transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from quantkit.methods import METHODS
from quantkit.methods.base import InputStatistics, Method, MethodOptions, Solution, Statistic
from quantkit.methods.rtn import Rtn, RtnOptions
from quantkit.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.schemes.grids import Grid

TRIAL_RANGES = 3
"""Ranges tried per group while factors are judged: eight choose the same factors or as good ones."""


class AwqOptions(MethodOptions):
    """Options of AWQ's rounding.

    Attributes:
        clip: search each group's range for the least output error; otherwise the full range is taken.
        search: ranges tried per group.
        negative_scales: see :class:`quantkit.methods.gptq.GptqOptions`.
    """

    clip: bool = True
    search: Annotated[int, Field(ge=1, le=200)] = 8
    negative_scales: bool = True


@METHODS.register
class Awq(Method):
    """Activation-aware weight quantization, after the transform of the same name."""

    name = "awq"
    summary = "scales channels with strong inputs up, clips ranges, rounds to nearest"
    source = "Lin et al. 2023, arXiv:2306.00978"
    cost = "minutes"
    Options: ClassVar[type[MethodOptions]] = AwqOptions
    transforms = ("awq",)
    needs = frozenset({Statistic.GRAM})
    options: AwqOptions

    def for_embeddings(self) -> Method:
        """Without inputs: round to nearest, within ranges that are clipped if they are for other layers."""
        options = self.options
        return Rtn(
            RtnOptions(
                range="search" if options.clip else "minmax",
                search=options.search,
                negative_scales=options.negative_scales,
            )
        )

    def trial_errors(
        self,
        weight: torch.Tensor,
        statistics: InputStatistics,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        factors: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """The error of the outputs within clipped ranges, of fewer than are searched; :meth:`Method.trial_errors`."""
        from quantkit.numerics.smoothing import rounding_errors

        if not self.options.clip or statistics.gram is None:
            return super().trial_errors(weight, statistics, scheme, scale_dtype, factors)

        def search(scaled: torch.Tensor, gram: torch.Tensor) -> Grid:
            """The grid of a scaled weight."""
            return self._grid(scaled, gram, scheme, scale_dtype, min(TRIAL_RANGES, self.options.search))

        return rounding_errors(weight, statistics.gram, scheme, scale_dtype, factors, search)

    def _grid(
        self, weight: torch.Tensor, gram: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, ranges: int
    ) -> Grid:
        """The grid of a weight whose ranges are clipped."""
        from quantkit.numerics.grid_search import search_grid

        negative = self.options.negative_scales
        return search_grid(weight, gram, scheme, scale_dtype, ranges, negative_scales=negative)

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        """Round to nearest within clipped ranges; see :meth:`Method.quantize`."""
        import torch

        from quantkit.numerics.grid_search import encode, quantized, range_grid
        from quantkit.numerics.refine import row_errors

        options = self.options
        gram = torch.eye(weight.shape[1], device=weight.device) if statistics.gram is None else statistics.gram
        if options.clip:
            grid = self._grid(weight, gram, scheme, scale_dtype, options.search)
        else:
            grid = range_grid(weight, scheme, scale_dtype)
        found = quantized(encode(weight, grid, scheme), grid, scheme)
        missing = (weight - found.dequantize(torch.float32)).T
        return Solution(found, error=row_errors(missing, gram), energy=row_errors(weight.T, gram))
