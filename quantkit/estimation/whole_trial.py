"""A trial run of a whole model without weights: what blocks keep of a sequence, and which share of layers computes.

As for a trial of one block (:mod:`quantkit.estimation.trial`), the layers are stand-ins.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from quantkit.engine.groups import hooked
from quantkit.engine.skeleton import Skeleton
from quantkit.estimation.anatomy import Cache

TOKENS = 67
"""Of the run: more than any convolution looks back, and of a size that nothing else in a model has."""
CACHES = ("past_key_values", "cache_params", "state")
"""Where outputs of transformers have what a model keeps."""


@dataclass(frozen=True, slots=True)
class WholeTrial:
    """What a run of all blocks showed.

    Attributes:
        caches: what each block keeps, then what the model keeps beside it; blocks that read what another one keeps are
            left out.
        shares: by the path of a layer the share of all tokens that came to it and to those beside it, as to experts.
    """

    caches: tuple[Cache, ...]
    shares: Mapping[str, float]


def try_all(skeleton: Skeleton) -> WholeTrial:
    """Run a model whose layers are stand-ins; whatever its code raises is passed on.

    Args:
        skeleton: the model.
    """
    seen: Counter[str] = Counter()

    def count(_: nn.Module, given: tuple[Any, ...], path: str) -> None:
        seen[path] += given[0].numel() // given[0].shape[-1]

    layers = [layer for segment in skeleton.segments for layer in segment.layers]
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    with torch.inference_mode(), hooked([(layer.module, partial(count, path=layer.path)) for layer in layers]):
        out = skeleton.text(input_ids=ids, use_cache=True)
    kept = next((found for name in CACHES if (found := getattr(out, name, None)) is not None), ())
    blocks = getattr(kept, "layers", ())
    beside = {name: held for name, held in vars(kept).items() if name != "layers"} if blocks else kept
    caches = [*map(_cache, blocks), Cache(0, "", state=_numbers(_tensors(beside)))]
    return WholeTrial(
        tuple(cache for cache in caches if cache.values or cache.state), _shares(seen, [x.path for x in layers])
    )


def _shares(seen: Counter[str], paths: Iterable[str]) -> dict[str, float]:
    """The mean share of tokens of layers whose paths differ in numbers alone, where some were called."""
    alike: dict[str, list[str]] = {}
    for path in paths:
        alike.setdefault(re.sub(r"\d+", "*", path), []).append(path)
    called = [members for members in alike.values() if any(seen[path] for path in members)]
    means = [min(1.0, sum(seen[path] for path in members) / (len(members) * TOKENS)) for members in called]
    return {path: mean for members, mean in zip(called, means, strict=True) for path in members}


def _cache(block: Any) -> Cache:
    """What a block keeps: keys and values of tokens, and what does not grow with them."""
    keys, values = getattr(block, "keys", None), getattr(block, "values", None)
    states = [each for each in _tensors(block) if each is not keys and each is not values]
    state = _numbers(states)
    if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor) or not keys.numel():
        return Cache(0, "", state=state)
    (_, heads, tokens, wide), (_, others, _, narrow) = keys.shape, values.shape
    words = f"(2 x {heads} heads x {wide})" if (heads, wide) == (others, narrow) else ""
    words = words or f"({heads} heads x {wide} + {others} heads x {narrow})"
    numbers, window = (keys.numel() + values.numel()) // tokens, getattr(block, "sliding_window", None)
    return Cache(numbers, words, window, state, heads + others)


def _numbers(tensors: Iterable[torch.Tensor]) -> int:
    return sum(each.numel() for each in tensors if each.is_floating_point())


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    """The tensors of an object, of its attributes, and of collections in it."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Mapping):
        yield from (tensor for each in held.values() for tensor in _tensors(each))
    elif isinstance(held, list | tuple):
        yield from (tensor for each in held for tensor in _tensors(each))
    elif hasattr(held, "__dict__"):
        yield from (tensor for each in vars(held).values() for tensor in _tensors(each))
