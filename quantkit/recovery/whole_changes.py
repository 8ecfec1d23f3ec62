"""What the transforms of a checkpoint made of the whole float model, such as a rotation, found once more.

A checkpoint whose hidden states are turned has other weights than the float model, and other hidden states between its
blocks. What a training compares with is the float model as these transforms turned it, which follows from its weights
and their options. What transforms did to single blocks, factors of channels, is fitted where it matters:
:func:`quantkit.numerics.low_rank.aligned`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.originals import Originals
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.transforming import Transforming
from quantkit.errors import QuantizationError
from quantkit.system.validation import parse_section
from quantkit.transforms import TRANSFORMS
from quantkit.transforms.base import Changes


def whole_changes(
    manifest: Mapping[str, Any] | None, skeleton: Skeleton, weights: CheckpointReader, device: torch.device
) -> Changes:
    """What the transforms that a manifest names do to the whole of a float model; no changes where they did nothing.

    Args:
        manifest: of the checkpoint; None for none.
        skeleton: of the float model that it was made of.
        weights: of that.
        device: where it is run on a few tokens.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape, or not finite.
        QuantizationError: the model is not one that they can change so, or runtimes turn the inputs of layers.
        QuantkitError: a transform is not there, or does not take its options any more.
    """
    records = [each for each in (manifest or {}).get("transforms") or () if each.get("model") is not None]
    if not records:
        return Changes()
    transforms = []
    for each in records:
        kind = TRANSFORMS.get(each["name"])
        if kind.online:
            raise QuantizationError(
                f"the checkpoint was made with {kind.name}: runtimes turn what its layers are given, trainings do not",
                f"quantize without {kind.name} what is to be trained",
            )
        transforms.append(kind(parse_section(kind.Options, each["options"], f"manifest.json: {kind.name}")))
    return Transforming(Originals(skeleton, weights, device), live=True).of_model(tuple(transforms))
