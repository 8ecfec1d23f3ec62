"""Float parameters of a segment that can be tuned beside the scales of its layers: of norms, and biases of layers.

They are told by what they are, not by names of models: a norm is a module that is no layer and has a vector called
``weight``. Left out is what other segments have too, and what the checkpoint does not hold as a tensor of its own, such
as the biases of stacked experts, which are written whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from quantkit.engine.segment import Segment
from quantkit.engine.skeleton import Skeleton

NORMS, BIASES = "norms", "biases"


def tunable_floats(skeleton: Skeleton, segment: Segment, train: Collection[str]) -> dict[str, nn.Parameter]:
    """The float parameters of a segment that are trained, by their names in the model.

    Args:
        skeleton: the model.
        segment: it is loaded.
        train: ``norms``, for their weights and biases; ``biases``, of the segment's layers. Other words say nothing.
    """
    own = set(skeleton.names.parameters().values())
    kinds = {name: kind for name, kind in _kinds(segment) if kind in train and name in own}
    return {name: skeleton.model.get_parameter(name) for name in kinds}


def _kinds(segment: Segment) -> Iterator[tuple[str, str]]:
    """Names of parameters in the model, each with what it is of."""
    layers = {layer.path for layer in segment.layers}
    for inside, module in segment.module.named_modules():
        path = f"{segment.prefix}.{inside}" if inside else segment.prefix
        if inside in segment.shared:
            continue
        if path in layers and getattr(module, "bias", None) is not None:
            yield f"{path}.bias", BIASES
        elif path not in layers and _is_norm(module):
            yield from ((f"{path}.{leaf}", NORMS) for leaf, _ in module.named_parameters(recurse=False))


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has a vector of factors, and beside it at most one of offsets."""
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and own.keys() <= {"weight", "bias"} and all(each.ndim == 1 for each in own.values())
