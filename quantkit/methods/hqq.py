"""HQQ: half-quadratic quantization, grids fitted to the weights alone under an error that forgives outliers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from quantkit.errors import SchemeError
from quantkit.methods import METHODS
from quantkit.methods.base import InputStatistics, Method, MethodOptions, Solution
from quantkit.schemes import PER_CHANNEL, IntScheme, Scheme

if TYPE_CHECKING:
    import torch

NEEDS_GROUPS = 4
"""Widths up to this lose their accuracy where a whole row shares one scale."""


class HqqOptions(MethodOptions):
    """Options of HQQ.

    Attributes:
        lp_norm: the ``p`` of the error ``Σ |w - ŵ|ᵖ``: the smaller, the less an outlier counts.
        beta: how soon a residual is given up as an outlier's: those above ``beta ** (-1 / (2 - lp_norm))`` are in part.
        beta_unit: what ``beta`` is measured in. ``weight`` is as published; as hardly a weight of a language model is
            off by more than the 0.17 that this comes to, it leaves plain least squares. ``step``, our extension, takes
            residuals in steps of their group's scale, so that outliers are given up whatever the size of the weights;
            it takes two to three times as long. It is meant for float zeros: at 4 bits it lowered the divergence of
            SmolLM2-135M by 5 % there, and raised it by a tenth with whole zeros and symmetric scales.
        kappa: factor of ``beta`` after each iteration. The paper's is 1.01; the package hqq takes it as an
            option and, up to 0.2.8, leaves ``beta`` as it is, as 1 does here.
        iterations: updates of the zero point.
        negative_scales: for symmetric schemes, see :class:`quantkit.methods.gptq.GptqOptions`.
    """

    lp_norm: Annotated[float, Field(ge=0.1, le=1)] = 0.7
    beta: Annotated[float, Field(gt=0, le=1e6)] = 10.0
    beta_unit: Literal["weight", "step"] = "weight"
    kappa: Annotated[float, Field(ge=1, le=10)] = 1.0
    iterations: Annotated[int, Field(ge=1, le=1000)] = 20
    negative_scales: bool = True


@METHODS.register
class Hqq(Method):
    """Half-quadratic quantization.

    With float zeros (``zeros: float``) this is the published method: the scale spans the group's range and the zero
    point is fitted. It differs from the package hqq 0.2.8 in that every group takes all iterations, where the package
    stops a whole layer as soon as its mean error rises, so that each row would depend on the others.

    Whole zeros and symmetric schemes, which servers load, are our extension: there the half-quadratic step fits the
    scale in closed form, and a whole zero is rounded at each update. The error of the weights falls below that of
    rounding there too, but the divergence of SmolLM2-135M at 4 bits only with float zeros and symmetric scales, not
    with whole zeros.
    """

    name = "hqq"
    summary = "half-quadratic fit of zero points to the weights alone"
    source = "Badri & Shaji 2023, https://mobiusml.github.io/hqq_blog/"
    cost = "seconds; no data"
    Options: ClassVar[type[MethodOptions]] = HqqOptions
    options: HqqOptions

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Only integer schemes have zero points, or scales that are free to be fitted."""
        super().check(scheme)
        _integer(scheme)

    @classmethod
    def warnings(cls, scheme: Scheme) -> tuple[str, ...]:
        """Few bits without groups."""
        if scheme.group_size != PER_CHANNEL or scheme.bits > NEEDS_GROUPS:
            return ()
        return (
            f"hqq at {scheme.bits} bits without groups loses most of the model's accuracy (46.05 against 57.41 on "
            "average for Llama-2-7B at 4 bits in arXiv:2309.05516); give a group_size, such as 64",
        )

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        """Fit the grid, then round to it; see :meth:`Method.quantize`."""
        from quantkit.methods.rtn import rounded
        from quantkit.numerics.grid_search import encode, quantized
        from quantkit.numerics.half_quadratic import Schedule, fit_grid
        from quantkit.schemes.grids.integer import IntGrids

        options, grids = self.options, IntGrids(_integer(scheme))
        in_steps = options.beta_unit == "step"
        schedule = Schedule(options.lp_norm, options.beta, options.kappa, options.iterations, in_steps)
        grid = fit_grid(weight, grids, scale_dtype, schedule, negative_scales=options.negative_scales)
        return rounded(weight, quantized(encode(weight, grid, scheme), grid, scheme), statistics)


def _integer(scheme: Scheme) -> IntScheme:
    if isinstance(scheme, IntScheme):
        return scheme
    raise SchemeError(
        f"hqq fits integer grids, and {scheme.describe()} is not one",
        "use scheme: int with any bits, group_size, axis and zeros, or method rtn or gptq with this scheme",
    )
