"""A trial run of a block without weights: which layers share an input, and what is alive when they are called.

Every layer gives zeros of the shape of its output, so that a block of any size runs in no time, by the model's own
code. What is no layer is random, so that tokens go to different experts.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quantkit.engine.groups import Enough, hooked
from quantkit.engine.layers import Layer
from quantkit.engine.skeleton import Skeleton
from quantkit.estimation.anatomy import Input

ROWS, LENGTH = 3, 67
"""Tokens of the trial: of sizes that nothing else in a model has."""
LARGEST = 1 << 26
"""Values of a parameter that is no layer's and is filled at most."""


def block_inputs(skeleton: Skeleton, index: int) -> tuple[tuple[Input, ...], tuple[str, ...]]:
    """The inputs of a block in the order of their calls, and a remark where it could not be run.

    An expert to which no token of the trial went is taken to read as others of its list do. Where the model's code does
    not run so, each layer is taken to have an input of its own.

    Args:
        skeleton: the model, after :func:`fill`.
        index: of the block.
    """
    layers = skeleton.segments[index].layers
    try:
        called = _called(skeleton, index)
    except Exception as error:  # the code of any model, which may ask more of its numbers
        width = skeleton.text.get_input_embeddings().weight.shape[1]
        alone = tuple(Input((layer.name,), 4 * width + layer.shape[1]) for layer in layers)
        why = f"its blocks do not run without weights ({type(error).__name__}), so each layer is taken by itself"
        return alone, (why,)
    return tuple(_with_uncalled(called, layers)), ()


def _called(skeleton: Skeleton, index: int) -> list[tuple[list[Layer], int]]:
    """The layers of each input that a run shows, and the numbers of a token that were alive."""
    found: list[tuple[list[Layer], int]] = []
    inputs: list[weakref.ref[torch.Tensor]] = []  # an input that were kept would be alive
    seen: set[str] = set()
    alive = _Alive()

    def record(layer: Layer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            if layer.name in seen:
                return
            seen.add(layer.name)
            place = next((place for place, each in enumerate(inputs) if each() is given[0]), len(inputs))
            if place == len(inputs):
                inputs.append(weakref.ref(given[0]))
                found.append(([], alive.numbers_of_a_token()))
            found[place][0].append(layer)

        return hook

    def enough(*_: Any) -> None:
        raise Enough

    segment = skeleton.segments[index]
    ended = segment.module.register_forward_hook(enough)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    with torch.inference_mode(), alive, hooked([(layer.module, record(layer)) for layer in segment.layers]):
        try:
            skeleton.text(input_ids=ids, use_cache=False)
        except Enough:
            ended.remove()
    return found


def _with_uncalled(called: list[tuple[list[Layer], int]], layers: Sequence[Layer]) -> Iterator[Input]:
    """Inputs, and for layers that were not called those of layers whose paths differ in numbers alone."""
    missing = {layer.path: layer for layer in layers}
    alike: dict[str, int] = {}
    paused = [numbers for _, numbers in called]
    for place, (members, numbers) in enumerate(called):
        yield Input(tuple(layer.name for layer in members), numbers)
        for layer in members:
            missing.pop(layer.path)
            alike[re.sub(r"\d+", "*", layer.path)] = place
    beside: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for path, layer in missing.items():
        place = alike.get(re.sub(r"\d+", "*", path), -1)
        beside.setdefault((place, tuple(re.findall(r"\d+", path)) if place >= 0 else (path,)), []).append(layer.name)
    for (place, _), names in beside.items():
        yield Input(tuple(names), paused[place])


def fill(skeleton: Skeleton) -> None:
    """Give a model without weights what it needs to run: layers that give zeros, and random numbers for the rest.

    It is of no other use afterwards. A layer of a class of its own, as some routers are, computes by itself.
    """
    random = torch.Generator().manual_seed(0)
    outside = [segment.layers[0] for segment in (skeleton.embedding, skeleton.head) if segment is not None]
    inside = [layer for segment in skeleton.segments for layer in segment.layers]
    layers = [layer for layer in inside if type(layer.module).__module__.startswith("torch.")] + outside
    for layer in layers:
        vars(layer.module)["forward"] = _stand_in(layer, random)
        layer.module.weight = nn.Parameter(torch.zeros(()).expand(layer.shape), False)  # for code that reads it itself
    for module in skeleton.model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_meta and tensor.numel() <= LARGEST:
                values = torch.randn(tensor.shape, generator=random).to(tensor.dtype)
                setattr(module, name, nn.Parameter(values, False) if isinstance(tensor, nn.Parameter) else values)


def _stand_in(layer: Layer, random: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    rows, columns = layer.shape
    if isinstance(layer.module, nn.Embedding):
        return lambda ids: torch.randn(*ids.shape, columns, generator=random)
    return lambda inputs: inputs.new_zeros(*inputs.shape[:-1], rows)


class _Alive(TorchFunctionMode):
    """Knows the tensors that were made while it is on and are not gone."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, torch.Tensor) and each.is_floating_point() and each.numel():
                self._made.append(weakref.ref(each))
        return found

    def numbers_of_a_token(self) -> int:
        """How many numbers of a token the storages hold that have a row for each sequence or each token.

        Masks and scores of tokens by tokens are left out, as if attention were computed in tiles.
        """
        there = [tensor for made in self._made if (tensor := made()) is not None]
        self._made = [weakref.ref(tensor) for tensor in there]
        sizes = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() // tensor.element_size()
            for tensor in there
            if tensor.ndim > 1 and tensor.shape[0] in (ROWS, ROWS * LENGTH) and tensor.shape.count(LENGTH) < 2
        }
        return sum(sizes.values()) // (ROWS * LENGTH)
