"""AWQ's factors: channels with strong inputs are scaled up before rounding, which then hurts them less.

The factors go into whatever makes the input, so that the file needs nothing special.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from quantkit.errors import SchemeError
from quantkit.methods.base import InputStatistics, Statistic
from quantkit.schemes import Scheme
from quantkit.transforms import TRANSFORMS
from quantkit.transforms.base import Change, SegmentView, SmoothingPlace, Transform, TransformOptions
from quantkit.transforms.channel_scales import ChannelScales

if TYPE_CHECKING:
    import torch


class AwqFactorsOptions(TransformOptions):
    """Options of AWQ's factors.

    Attributes:
        alphas: steps of the exponent between 0 and 1.
        duo_scaling: try factors that fall with the size of a channel's weights as well.
    """

    alphas: Annotated[int, Field(ge=1, le=200)] = 20
    duo_scaling: bool = True


@TRANSFORMS.register
class AwqFactors(Transform):
    """Activation-aware factors of input channels."""

    name = "awq"
    summary = "scales input channels with strong inputs up, and what makes the input down"
    source = "Lin et al. 2023, arXiv:2306.00978"
    Options: ClassVar[type[TransformOptions]] = AwqFactorsOptions
    needs = frozenset({Statistic.ABS_MEAN, Statistic.GRAM})
    smooths = True
    options: AwqFactorsOptions

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse a scheme whose codes another program chooses: factors are tried by rounding."""
        if scheme.quantizer is not None:
            owner = scheme.quantizer
            raise SchemeError(
                f"only {owner}'s own quantizer chooses codes of {scheme.describe()}", f"use method: {owner}"
            )

    def of_segment(self, segment: SegmentView) -> Change | None:
        """Factors for each input that can be scaled and that a quantized layer reads."""
        found = ChannelScales()
        for place in segment.places:
            if any(layer in segment.schemes and layer in segment.statistics for layer in place.balance_layers):
                found.places += 1
                factors = self.factors(segment, place)
                if factors is not None:
                    found.add(place, factors)
        return found if found.places else None

    def factors(self, segment: SegmentView, place: SmoothingPlace) -> torch.Tensor | None:
        """The factors with which the method loses least; variants that ask the same of an input share the search.

        Returns:
            Positive float32 ``[in_features]``, or None to leave the input as it is.
        """
        layers = [layer for layer in place.balance_layers if layer in segment.schemes]
        known = next(segment.statistics[layer] for layer in place.balance_layers if layer in segment.statistics)
        if known.tokens == 0:
            return None
        schemes = tuple((layer, segment.schemes[layer]) for layer in layers)
        key = ("awq", self.options, schemes, segment.scale_dtype, segment.method.name, segment.method.options)
        if key not in known.derived:
            members = [(segment.parameter(f"{layer}.weight"), scheme) for layer, scheme in schemes]
            known.derived[key] = self._search(members, known, segment, place.channels)
        found: torch.Tensor | None = known.derived[key]
        return found

    def _search(
        self,
        members: Sequence[tuple[torch.Tensor, Scheme]],
        known: InputStatistics,
        segment: SegmentView,
        channels: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """The factors for the layers that read an input, float32 ``[out_features, in_features]`` with their schemes."""
        import torch

        from quantkit.numerics.smoothing import pooled, sampled, search_factors, weight_sizes

        if known.abs_mean is None:
            raise ValueError("AWQ needs the mean magnitude of the inputs")
        size = pooled(weight_sizes(members), channels) if self.options.duo_scaling else None
        samples = sampled(members)

        def trial(factors: Sequence[torch.Tensor]) -> torch.Tensor:
            """The sum over the layers."""
            judge, dtype = segment.method.trial_errors, segment.scale_dtype
            errors = [judge(each.weight, known, each.scheme, dtype, factors) * each.stands_for for each in samples]
            return torch.stack(errors).sum(0)

        return search_factors(trial, pooled(known.abs_mean, channels), size, self.options.alphas)

    def restore(self, tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any]) -> Change:
        """The factors of a segment, as they were stored."""
        return ChannelScales.of(tensors, data)

    def notes(self, done: Sequence[Mapping[str, Any] | None]) -> tuple[str, ...]:
        """Says so where nothing was scaled, so that only the method after it was at work."""
        if any(each["offsets"] for each in done if each is not None):
            return ()
        places = sum(each["places"] for each in done if each is not None)
        why = f"no factors lowered the error of any of {places} inputs" if places else "no input of it can be scaled"
        return (f"awq scaled nothing in this model: {why}",)
