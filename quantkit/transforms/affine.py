"""AffineQuant: invertible affine transforms of the inputs of layers, learned block by block on the error of its output.

``X W = (X A⁻¹)(A W)``, and what is rounded is ``A W``. ``A`` is learned by gradients through a block whose weights are
rounded as they would be. It starts from a diagonal, and its other elements come in from the diagonal outward (the
gradual mask of the paper); each row stays strictly dominated by its diagonal, so that ``A`` is invertible (Levy and
Desplanques).

Here ``A`` is what goes into plain weights: a diagonal between a norm and the layers that read it and between ``up`` and
``down``, and a full matrix for each head of values. It starts from AWQ's factors, and these are kept where batches that
are held out see no gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.transforms import TRANSFORMS
from quantkit.transforms.affine_change import Affine
from quantkit.transforms.affine_learning import AffineOptions, Learning
from quantkit.transforms.awq import AwqFactors
from quantkit.transforms.base import Change, SegmentView, TransformOptions
from quantkit.transforms.channel_scales import ChannelScales

if TYPE_CHECKING:
    import torch


@TRANSFORMS.register
class AffineQuant(AwqFactors):
    """Learned affine transforms."""

    name = "affine"
    summary = "learns factors of channels and matrices of heads on the error of each block's output; takes minutes"
    source = "AffineQuant, Ma et al. 2024, arXiv:2403.12544"
    Options: ClassVar[type[TransformOptions]] = AffineOptions
    learns = True
    options: AffineOptions

    def of_segment(self, segment: SegmentView) -> Change | None:
        """Learn from AWQ's factors on."""
        import torch

        start = AwqFactors.of_segment(self, segment)
        places = [each for each in segment.places if any(layer in segment.schemes for layer in each.balance_layers)]
        if not isinstance(start, ChannelScales):
            return None
        if segment.runs is None or not places:
            return Affine(start)
        with torch.enable_grad():
            return Learning(self.options, segment, segment.runs, places, start).run()

    def restore(self, tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any]) -> Change:
        """What was learned of a segment, as it was stored."""
        return Affine.of(tensors, data)

    def notes(self, done: Sequence[Mapping[str, Any] | None]) -> tuple[str, ...]:
        """How many blocks learned something, and what they came to."""
        told = [each for each in done if each is not None and "after" in each]
        better = [each for each in told if each["after"] < each["before"]]
        if not told:
            return ("affine learned nothing in this model: no input of it can be scaled",)
        left = sum(each["after"] / each["before"] for each in told if each["before"]) / len(told)
        return (f"affine bettered {len(better)} of {len(told)} blocks, to {left:.2f} of the error with AWQ's factors",)
