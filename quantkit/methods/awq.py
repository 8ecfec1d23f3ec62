"""AWQ: scale the channels with strong inputs up before rounding, then clip each group's range.

The factors go into whatever makes the input, so that the file needs nothing special; where that is can be found by
:mod:`quantkit.engine.smoothing`. Before another method, as in ``awq+gptq``, only the factors are used.
"""

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


class ScalingOptions(MethodOptions):
    """Options of AWQ's factors.

    Attributes:
        alphas: exponents tried between 0 and 1.
        duo_scaling: let a channel's factor fall with the size of its weights too.
    """

    alphas: Annotated[int, Field(ge=1, le=200)] = 20
    duo_scaling: bool = True


class AwqOptions(ScalingOptions):
    """Options of AWQ.

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
    """Activation-aware weight quantization."""

    name = "awq"
    summary = "scales channels with strong inputs up, clips ranges, rounds to nearest"
    source = "Lin et al. 2023, arXiv:2306.00978"
    cost = "minutes"
    Options: ClassVar[type[MethodOptions]] = AwqOptions
    ScalingOptions: ClassVar[type[MethodOptions]] = ScalingOptions
    scales_inputs = True
    needs = frozenset({Statistic.ABS_MEAN, Statistic.GRAM})
    options: AwqOptions

    def channel_factors(
        self,
        members: Sequence[tuple[torch.Tensor, Scheme]],
        statistics: InputStatistics,
        scale_dtype: torch.dtype,
        channels: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """The factors of least output error; variants that ask the same of an input share the search."""
        from quantkit.numerics.smoothing import search_factors

        if statistics.gram is None or statistics.abs_mean is None:
            raise ValueError("AWQ needs the Gram matrix and the mean magnitude of the inputs")
        options = ScalingOptions.model_validate(self.options.model_dump(include=set(ScalingOptions.model_fields)))
        key = ("awq", options, tuple(scheme for _, scheme in members), scale_dtype)
        if key not in statistics.derived:
            statistics.derived[key] = search_factors(
                members,
                statistics.gram,
                statistics.abs_mean,
                scale_dtype,
                alphas=options.alphas,
                duo_scaling=options.duo_scaling,
                channels=channels,
            )
        found: torch.Tensor | None = statistics.derived[key]
        return found

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

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        """Round to nearest within clipped ranges; see :meth:`Method.quantize`."""
        import torch

        from quantkit.numerics.grid_search import encode, quantized, range_grid, search_grid
        from quantkit.numerics.refine import row_errors

        options = self.options
        gram = torch.eye(weight.shape[1], device=weight.device) if statistics.gram is None else statistics.gram
        if options.clip:
            grid = search_grid(
                weight, gram, scheme, scale_dtype, options.search, negative_scales=options.negative_scales
            )
        else:
            grid = range_grid(weight, scheme, scale_dtype)
        found = quantized(encode(weight, grid, scheme), grid, scheme)
        missing = (weight - found.dequantize(torch.float32)).T
        return Solution(found, error=row_errors(missing, gram), energy=row_errors(weight.T, gram))
