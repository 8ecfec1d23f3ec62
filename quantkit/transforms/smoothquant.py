"""SmoothQuant's factors: what is hard to round in the inputs goes over into the weights, ``max|x|^a / max|w|^(1-a)``.

Meant for schemes that round inputs, where a few channels would take the range of all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from quantkit.methods.base import InputStatistics, Statistic
from quantkit.schemes import Scheme
from quantkit.transforms import TRANSFORMS
from quantkit.transforms.base import TransformOptions
from quantkit.transforms.factor_search import NEEDED, FactorOptions, FactorSearch

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.smoothing import Strength


class SmoothQuantOptions(FactorOptions):
    """Options of SmoothQuant's factors.

    Attributes:
        alpha: the exponent for all inputs; without it, that with which each input loses least.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] | None = None


@TRANSFORMS.register
class SmoothQuant(FactorSearch):
    """Factors that even out the largest inputs and the largest weights of channels."""

    name = "smoothquant"
    summary = "scales channels with large inputs down, and the weights that read them up; for inputs that are rounded"
    source = "Xiao et al. 2022, arXiv:2211.10438"
    Options: ClassVar[type[TransformOptions]] = SmoothQuantOptions
    needs = NEEDED | {Statistic.ABS_MAX}
    options: SmoothQuantOptions

    def strength(
        self, members: Sequence[tuple[torch.Tensor, Scheme]], known: InputStatistics, channels: torch.Tensor | None
    ) -> Strength:
        """The largest ``|x|`` and the largest ``|w|`` of each channel."""
        import torch

        from quantkit.numerics.smoothing import Strength, pooled

        if known.abs_max is None:
            raise ValueError("SmoothQuant needs the largest inputs")
        largest = torch.stack([weight.abs().amax(0) for weight, _ in members]).amax(0)
        strength = pooled(known.abs_max, channels)
        return Strength(strength, pooled(largest, channels), both=False, alpha=self.options.alpha)
