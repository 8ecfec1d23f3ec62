"""AWQ's factors: channels with strong inputs are scaled up before rounding, which then hurts them less."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from quantkit.methods.base import InputStatistics, Statistic
from quantkit.schemes import Scheme
from quantkit.transforms import TRANSFORMS
from quantkit.transforms.base import TransformOptions
from quantkit.transforms.factor_search import NEEDED, FactorOptions, FactorSearch

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.smoothing import Strength


class AwqFactorsOptions(FactorOptions):
    """Options of AWQ's factors.

    Attributes:
        duo_scaling: try factors that fall with the size of a channel's weights as well.
    """

    duo_scaling: bool = True


@TRANSFORMS.register
class AwqFactors(FactorSearch):
    """Activation-aware factors of input channels."""

    name = "awq"
    summary = "scales input channels with strong inputs up, and what makes the input down"
    source = "Lin et al. 2023, arXiv:2306.00978"
    Options: ClassVar[type[TransformOptions]] = AwqFactorsOptions
    needs = NEEDED | {Statistic.ABS_MEAN}
    options: AwqFactorsOptions

    def strength(
        self, members: Sequence[tuple[torch.Tensor, Scheme]], known: InputStatistics, channels: torch.Tensor | None
    ) -> Strength:
        """Mean ``|x|``, and on request over the mean ``|w|``, relative to the largest of its group."""
        from quantkit.numerics.smoothing import Strength, pooled, weight_sizes

        if known.abs_mean is None:
            raise ValueError("AWQ needs the mean magnitude of the inputs")
        size = pooled(weight_sizes(members), channels) if self.options.duo_scaling else None
        return Strength(pooled(known.abs_mean, channels), size)
