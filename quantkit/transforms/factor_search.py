"""Factors of input channels whose strength is searched for: by what the method that follows would lose.

They go into whatever makes the input, so that the file needs nothing special. Where runtimes round the input, what is
lost by that counts as well, on some tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from quantkit.errors import SchemeError
from quantkit.methods.base import InputStatistics, Statistic
from quantkit.schemes import Scheme
from quantkit.transforms.base import Change, SegmentView, SmoothingPlace, Transform, TransformOptions
from quantkit.transforms.channel_scales import ChannelScales

if TYPE_CHECKING:
    import torch

    from quantkit.numerics.smoothing import Sample, Strength


class FactorOptions(TransformOptions):
    """Options of a search of factors.

    Attributes:
        alphas: steps of the exponent between 0 and 1.
    """

    alphas: Annotated[int, Field(ge=1, le=200)] = 20


class FactorSearch(Transform):
    """Factors for each input that can be scaled and that a quantized layer reads.

    A subclass says in :meth:`strength` what factors are made of.
    """

    Options: ClassVar[type[TransformOptions]] = FactorOptions
    smooths = True
    options: FactorOptions

    @abstractmethod
    def strength(
        self, members: Sequence[tuple[torch.Tensor, Scheme]], known: InputStatistics, channels: torch.Tensor | None
    ) -> Strength:
        """What the factors of an input are powers of.

        Args:
            members: the layers that read it, float32 ``[out_features, in_features]``, with their schemes.
            known: of the input.
            channels: see :class:`quantkit.transforms.base.SmoothingPlace`.
        """

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
        key = (self.name, self.options, schemes, segment.scale_dtype, segment.method.name, segment.method.options)
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

        from quantkit.numerics.smoothing import sampled, search_factors

        samples = sampled(members)

        def trial(factors: Sequence[torch.Tensor]) -> torch.Tensor:
            """The sum over the layers."""
            errors = [_lost(each, known, segment, factors) * each.stands_for for each in samples]
            return torch.stack(errors).sum(0)

        return search_factors(trial, self.strength(members, known, channels), self.options.alphas)

    def restore(self, tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any]) -> Change:
        """The factors of a segment, as they were stored."""
        return ChannelScales.of(tensors, data)

    def notes(self, done: Sequence[Mapping[str, Any] | None]) -> tuple[str, ...]:
        """Says so where nothing was scaled, so that only the method after it was at work."""
        if any(each["offsets"] for each in done if each is not None):
            return ()
        places = sum(each["places"] for each in done if each is not None)
        why = f"no factors lowered the error of any of {places} inputs" if places else "no input of it can be scaled"
        return (f"{self.name} scaled nothing in this model: {why}",)


def _lost(
    sample: Sample, known: InputStatistics, segment: SegmentView, factors: Sequence[torch.Tensor]
) -> torch.Tensor:
    """What some rows of a layer lose with each of some factors, float32 ``[len(factors)]``.

    Where inputs are rounded, weights are judged by rounding to the spanning grid whatever the method, so that both
    errors are in one unit.
    """
    from quantkit.numerics.smoothing import input_errors, rounding_errors

    rounding, dtype = sample.scheme.input_rounding, segment.scale_dtype
    if rounding is None or known.sample is None or known.gram is None:
        return segment.method.trial_errors(sample.weight, known, sample.scheme, dtype, factors)
    weights = rounding_errors(sample.weight, known.gram, sample.scheme, dtype, factors)
    return weights + input_errors(sample.weight, known.sample, rounding, factors)


NEEDED = frozenset({Statistic.GRAM, Statistic.SAMPLE})
"""The statistics by which factors are judged."""
