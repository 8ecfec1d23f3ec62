"""Matrices of decoder blocks that stay float unless a recipe asks for them, each with its reason.

They are told by what they are beside, not by a table of models:

- A **router** lies beside experts, in a module that holds no other matrix, and has as many rows as there are experts.
- A **gate** has a single row, as that of a shared expert.
- The **pace of a recurrence** is a small layer with as many rows as a bare parameter beside it, such as Mamba's
  ``dt_proj`` beside ``A_log``, or Qwen3.5's ``in_proj_a`` beside ``dt_bias``.
- **Coefficients** have a side of eight or less, as those of AltUp.
- What is the weight of no layer, such as a convolution, cannot be quantized at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from quantkit.engine.heads import Heads
from quantkit.engine.segment import Segment
from quantkit.engine.skeleton import Skeleton

ROUTER = "routers choose among experts"
GATE = "a gate of one output"
RECURRENCE = "they set the pace of a recurrence"
COEFFICIENTS = "coefficients, too small for scales"
CONVOLUTION = "convolutions are no linear layers"
TABLE = "tables of embeddings are no linear layers"
BARE = "bare parameters are no linear layers"
SMALL_SIDE = 8
"""A matrix with a side no longer than this has coefficients."""
SMALL_SHARE = 1 / 16
"""A layer of a recurrence with at most this share of the weights of the layers beside it is small."""


@dataclass(frozen=True, slots=True)
class FloatPart:
    """A matrix of a decoder block that stays float by default.

    Attributes:
        name: in the checkpoint, without ``.weight``.
        path: the same in the model.
        weights: how many it has.
        reason: why it stays float.
        is_layer: whether it is a layer, which a recipe may ask for.
    """

    name: str
    path: str
    weights: int
    reason: str
    is_layer: bool


def float_parts(skeleton: Skeleton) -> dict[str, FloatPart]:
    """The matrices of the blocks that stay float by default, by their names; those that blocks share once."""
    layers = {id(layer.weight): layer for segment in skeleton.segments for layer in segment.layers}
    seen: set[int] = set()
    found: dict[str, FloatPart] = {}
    for segment in skeleton.segments:
        reasons = _reasons(segment.module)
        for name, parameter in segment.module.named_parameters():
            layer = layers.get(id(parameter))
            if parameter.ndim < 2 or id(parameter) in seen or (layer is not None and name not in reasons):
                continue
            seen.add(id(parameter))
            path = f"{segment.prefix}.{name}"
            stored = layer.name if layer else skeleton.names.written(path).removesuffix(".weight")
            path = layer.path if layer else path.removesuffix(".weight")
            reason = reasons.get(name, BARE)
            found[stored] = FloatPart(stored, path, parameter.numel(), reason, is_layer=layer is not None)
    return found


def block_weights(segments: Iterable[Segment]) -> int:
    """Number of weights in the matrices of the blocks; those that blocks share count once."""
    matrices = (each for segment in segments for each in segment.module.parameters() if each.ndim >= 2)
    return sum({id(each): each.numel() for each in matrices}.values())


def _reasons(block: nn.Module) -> dict[str, str]:
    """By the names of parameters of a block why they stay float."""
    found: dict[str, str] = {}
    for path, module in block.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            reason = _alone(module, parameter.shape)
            found |= {} if reason is None else {name: reason}
    for path, module in block.named_modules():
        found |= dict.fromkeys(_recurrence(path, module), RECURRENCE)
    return found | dict.fromkeys(_routers(block, ""), ROUTER)


def _alone(module: nn.Module, shape: tuple[int, ...]) -> str | None:
    """Why a parameter of a module stays float, whatever it lies beside."""
    if isinstance(module, nn.Linear) and len(shape) == 2 and min(shape) <= SMALL_SIDE:
        return GATE if shape[0] == 1 else COEFFICIENTS
    if isinstance(module, _ConvNd):
        return CONVOLUTION
    return TABLE if isinstance(module, nn.Embedding) else None


def _recurrence(path: str, module: nn.Module) -> Iterator[str]:
    """The weights of small layers whose outputs number the values of a bare parameter beside them, or twice that."""
    layers = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
    bare = [each for _, each in module.named_parameters(recurse=False)]
    lengths = {each.shape[0] for each in bare if each.ndim} | {max(each.shape) for each in bare if each.ndim}
    total = sum(layer.weight.numel() for layer in layers.values())
    for name, layer in layers.items():
        is_small = layer.weight.numel() <= SMALL_SHARE * total
        if is_small and {layer.out_features, layer.out_features / 2} & lengths:
            yield f"{path}.{name}.weight".lstrip(".")


def _routers(module: nn.Module, path: str) -> Iterator[str]:
    """The parameters inside a module that choose among experts inside it."""
    prefix = f"{path}." if path else ""
    inside = set[int]().union(*(_experts(child) for child in module.children()))
    bare = module.named_parameters(path, recurse=False)
    yield from (name for name, each in bare if each.ndim == 2 and each.shape[0] in inside)
    numbers = inside | _stacked(module)
    for name, child in module.named_children():
        yield from (f"{prefix}{name}.{found}" for found in _chooses(child, numbers))
        yield from () if name.isdigit() else _routers(child, f"{prefix}{name}")


def _chooses(branch: nn.Module, numbers: set[int]) -> Iterator[str]:
    """The only matrix of a branch, if it has a row for each expert, or for each number of a vector beside it."""
    matrices = [(name, each) for name, each in branch.named_parameters() if each.ndim >= 2]
    if not numbers or len(matrices) != 1:
        return
    ((name, matrix),) = matrices
    beside = name.removesuffix("weight") + "bias"
    vectors = [*branch.named_parameters(), *branch.named_buffers()]
    lengths = {each.shape[0] for other, each in vectors if each.ndim == 1 and other != beside}
    if matrix.ndim == 2 and (matrix.shape[0] in numbers or matrix.shape[0] in lengths):
        yield name


def _experts(module: nn.Module) -> set[int]:
    """The numbers of experts of what is inside a module."""
    found: set[int] = set()
    for child in module.modules():
        alike = [each for name, each in child.named_children() if name.isdigit() and not isinstance(child, Heads)]
        if len(alike) > 1 and all(any(isinstance(m, nn.Linear) for m in each.modules()) for each in alike):
            found.add(len(alike))
        found |= _stacked(child)
    return found


def _stacked(module: nn.Module) -> set[int]:
    """How many matrices the bare parameters of a module stack."""
    bare = () if isinstance(module, _ConvNd) else module.parameters(recurse=False)
    return {each.shape[0] for each in bare if each.ndim == 3 and each.shape[0] > 1}
