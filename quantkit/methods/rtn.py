"""Round to nearest: every weight goes to the nearest value of its group's grid. Needs no calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from quantkit.methods import METHODS
from quantkit.methods.base import InputStatistics, Method, MethodOptions, Solution
from quantkit.schemes import IntScheme

if TYPE_CHECKING:
    import torch


class RtnOptions(MethodOptions):
    """Options of round to nearest.

    Attributes:
        range: ``minmax`` spans the whole range of a group, ``search`` looks for the range of least square
            error, which clips.
        negative_scales: with ``search``, see :class:`quantkit.methods.gptq.GptqOptions`.
    """

    range: Literal["minmax", "search"] = "minmax"
    negative_scales: bool = True


@METHODS.register
class Rtn(Method):
    """Round to nearest."""

    name = "rtn"
    summary = "round to nearest; no calibration, seconds"
    source = "Jacob et al. 2018, arXiv:1712.05877"
    Options: ClassVar[type[MethodOptions]] = RtnOptions
    options: RtnOptions

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: IntScheme, scale_dtype: torch.dtype
    ) -> Solution:
        """Round each weight to its grid; see :meth:`Method.quantize`."""
        from quantkit.numerics.grids import encode, quantized, range_grid, search_grid
        from quantkit.numerics.refine import row_errors

        if self.options.range == "search":
            turned = self.options.negative_scales
            grid = search_grid(weight, None, scheme, scale_dtype, candidates=24, negative_scales=turned)
        else:
            grid = range_grid(weight, scheme, scale_dtype)
        found = quantized(encode(weight, grid, scheme), grid, scheme)
        difference = weight - found.dequantize(weight.dtype)
        return Solution(found, error=row_errors(difference.T, None), energy=row_errors(weight.T, None))
