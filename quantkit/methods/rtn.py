"""Round to nearest: every weight goes to the nearest value of its group's grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from quantkit.methods import METHODS
from quantkit.methods.base import InputStatistics, Method, MethodOptions, Solution, Statistic
from quantkit.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    import torch


class RtnOptions(MethodOptions):
    """Options of round to nearest.

    Attributes:
        range: ``minmax`` spans the whole range of a group; ``search`` looks for the range of least square error,
            which clips; ``weighted`` does so with each weight's error weighed by the mean square of its input, which
            needs calibration and is what llama.cpp's importance matrix does.
        search: ranges tried per group.
        negative_scales: with a search, see :class:`quantkit.methods.gptq.GptqOptions`.
    """

    range: Literal["minmax", "search", "weighted"] = "minmax"
    search: Annotated[int, Field(ge=1, le=200)] = 24
    negative_scales: bool = True


@METHODS.register
class Rtn(Method):
    """Round to nearest."""

    name = "rtn"
    summary = "round to nearest"
    source = "Jacob et al. 2018, arXiv:1712.05877"
    cost = "seconds"
    Options: ClassVar[type[MethodOptions]] = RtnOptions
    options: RtnOptions

    def __init__(self, options: MethodOptions) -> None:
        super().__init__(options)
        if self.options.range == "weighted":
            self.needs = frozenset({Statistic.SQUARE_MEAN})

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        """Round each weight to its grid; see :meth:`Method.quantize`."""
        from quantkit.numerics.grid_search import encode, quantized, range_grid, search_grid

        if self.options.range == "minmax":
            grid = range_grid(weight, scheme, scale_dtype)
        else:
            options, importance = self.options, statistics.square_mean
            grid = search_grid(
                weight, importance, scheme, scale_dtype, options.search, negative_scales=options.negative_scales
            )
        return rounded(weight, quantized(encode(weight, grid, scheme), grid, scheme), statistics)


def rounded(weight: torch.Tensor, found: QuantizedWeight, statistics: InputStatistics) -> Solution:
    """A solution with the error as far as the statistics tell it.

    With the mean square of each input, the error is that of uncorrelated inputs of this strength.
    """
    importance = 1.0 if statistics.square_mean is None else statistics.square_mean
    difference = weight - found.dequantize(weight.dtype)
    return Solution(
        found,
        error=difference.square_().mul_(importance).sum(1),
        energy=weight.square().mul_(importance).sum(1),
    )
