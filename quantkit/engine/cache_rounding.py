"""Keys and values of attention, seen where they go into the KV cache, and rounded there as a server stores them.

An attention module of transformers hands keys and values to the cache that it is given, after the rotary embedding, and
computes with what that gives back. So whatever takes the place of the cache sees them, with any attention function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import VariantTask
from quantkit.errors import QuantizationError
from quantkit.numerics.activation_rounding import round_inputs, static_scale
from quantkit.schemes.rounding import CACHE_SCALES, CacheRounding

CACHE = "past_key_values"
LEAVE_OUT = "leave out kv_cache, and say to the server in what it stores the cache"

Changed = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Makes of keys and values, each ``[batch, heads, tokens, width]``, what is stored."""


@dataclass(frozen=True, slots=True)
class CacheRounder:
    """What becomes of the keys and values of one attention module.

    Attributes:
        rounding: how they are rounded.
        scales: of keys and of values, float32: one number, or one a head.
    """

    rounding: CacheRounding
    scales: tuple[torch.Tensor, torch.Tensor]

    def __call__(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as a server reads them back."""
        key_scale, value_scale = (scale.reshape(-1, 1, 1) for scale in self.scales)
        inputs = self.rounding.as_inputs()
        return round_inputs(keys, inputs, key_scale), round_inputs(values, inputs, value_scale)


class _InPlace:
    """Stands in the place of a cache, which it hands everything to; without one it keeps nothing."""

    def __init__(self, changed: Changed, cache: Any) -> None:
        self._changed, self._cache = changed, cache

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What attention computes with."""
        keys, values = self._changed(keys, values)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def attention_modules(root: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules inside another that are given a KV cache and put keys into it, by their names in it."""
    takes = {name: each for name, each in root.named_modules() if CACHE in inspect.signature(each.forward).parameters}
    return {
        name: module
        for name, module in takes.items()
        if name and not any(other.startswith(f"{name}.") for other in takes) and _puts_keys(module)
    }


def _puts_keys(module: nn.Module) -> bool:
    """Whether its code hands something to ``update`` of a cache, which convolutions and recurrences do not."""
    try:
        return ".update(" in inspect.getsource(type(module).forward)
    except (OSError, TypeError):  # no source to look at: a run tells whether it does
        return True


def put_cache_rounder(module: nn.Module, changed: Changed) -> Any:
    """Let an attention module compute with what is made of its keys and values.

    Returns:
        The handle by whose ``remove`` that ends.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, CACHE: _InPlace(changed, kwargs.get(CACHE))}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


class Largest:
    """The largest magnitudes of keys and values of the modules of a block as batches pass.

    Attributes:
        found: of keys and of values, ``[heads]`` each, by the names of modules in the block.
    """

    def __init__(self) -> None:
        self.found: dict[str, list[torch.Tensor]] = {}

    def add(self, found: Mapping[str, list[torch.Tensor]]) -> None:
        """Count what was seen elsewhere, by the names of modules; on any device."""
        for name, seen in found.items():
            pairs = zip(self.found.get(name, seen), seen, strict=True)
            self.found[name] = [torch.maximum(known, new.to(known.device)) for known, new in pairs]

    @contextmanager
    def watching(self, root: nn.Module, tokens: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Inside the block, keys and values of a run count.

        Args:
            root: the block.
            tokens: takes ``[tokens, heads, width]`` of a batch, and leaves out those of padding.
        """
        with ExitStack() as hooks:
            for name, module in attention_modules(root).items():

                def see(
                    keys: torch.Tensor, values: torch.Tensor, name: str = name
                ) -> tuple[torch.Tensor, torch.Tensor]:
                    seen = [
                        tokens(each.transpose(1, 2).flatten(0, 1)).abs().amax((0, 2)).float() for each in (keys, values)
                    ]
                    self.add({name: seen})
                    return keys, values

                hooks.callback(put_cache_rounder(module, see).remove)
            yield

    def scales(self, rounding: CacheRounding, root: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
        """The scales by the path of a module in the block, followed by ``k_scale`` or ``v_scale``.

        Of one for all heads a tensor ``[1]``, else ``[heads, 1, 1]``, float32.

        Raises:
            QuantizationError: a module gave its keys and values to no cache.
        """
        modules = attention_modules(root)
        missing = next((name for name in modules if name not in self.found), None)
        if missing is not None:
            raise QuantizationError(
                f"{prefix}.{missing} hands its keys and values to no cache: their scales are not known", LEAVE_OUT
            )
        found = {}
        for name in modules:
            for end, largest in zip(CACHE_SCALES, self.found[name], strict=True):
                whole = largest if rounding.per_head else largest.amax()
                scale = static_scale(whole, rounding.as_inputs()).cpu()
                found[f"{name}{end}"] = scale.view(-1, 1, 1) if rounding.per_head else scale
        return found


def scale_shapes(skeleton: Skeleton, rounding: CacheRounding) -> dict[str, tuple[int, ...]]:
    """The shapes of all scales of a model's cache, told without a run, by their names in the checkpoint.

    Of one for each head as many as the config says that keys and values have; see :meth:`Largest.scales`.
    """
    config, found = skeleton.model.config.get_text_config(), dict[str, tuple[int, ...]]()
    whole = config.num_attention_heads
    for segment in skeleton.segments:
        paths = {layer.path: layer.name for layer in segment.layers}
        for name, module in attention_modules(segment.module).items():
            groups = getattr(module, "num_key_value_groups", None)
            heads = whole // groups if groups else getattr(config, "num_key_value_heads", None) or whole
            shape = (heads, 1, 1) if rounding.per_head else (1,)
            found |= {_stored_name(f"{segment.prefix}.{name}", paths) + end: shape for end in CACHE_SCALES}
    return found


def _stored_name(module: str, paths: Mapping[str, str]) -> str:
    """What a module is called in the checkpoint, by the names there of the layers in it.

    Args:
        module: its path in the model.
        paths: by the paths of layers their names in the checkpoint.
    """
    path = next(path for path in paths if path.startswith(f"{module}."))
    return paths[path].removesuffix(path.removeprefix(module))


def hand_over_scales(
    task: VariantTask, prefix: str, paths: Mapping[str, str], largest: Largest, root: nn.Module
) -> None:
    """Give a task's sink the scales of the keys and values of a block.

    Args:
        task: it wants them.
        prefix: name of the block in the model.
        paths: by the paths of its layers their names in the checkpoint.
        largest: what was seen.
        root: the block.
    """
    if task.cache is None:
        return
    for name, scale in largest.scales(task.cache, root, prefix).items():
        module, _, leaf = f"{prefix}.{name}".rpartition(".")
        task.sink.replace(f"{_stored_name(module, paths)}.{leaf}", scale)


def check_cache(skeleton: Skeleton, quantized: Collection[str]) -> None:
    """Refuse a model whose KV cache has no scales that servers could use, before any work.

    Args:
        skeleton: of the model.
        quantized: its layers that are quantized.

    Raises:
        QuantizationError: its cache holds something else than keys and values, blocks share an attention, or one of
            them is all float.
    """
    name = type(skeleton.model).__name__
    unknown = f"no attention of {name} takes a cache called {CACHE}"
    if getattr(skeleton.model.config.get_text_config(), "kv_lora_rank", None):
        raise QuantizationError(f"kv_cache: servers of {name} store latents in place of keys and values", LEAVE_OUT)
    blocks = [each for each in skeleton.segments if attention_modules(each.module)]
    for each in blocks:
        if any(
            part.startswith(f"{attention}.") for attention in attention_modules(each.module) for part in each.shared
        ):
            raise QuantizationError(f"kv_cache: {each.prefix} shares its attention with other blocks", LEAVE_OUT)
    plain = next((each.prefix for each in blocks if not set(each.linears) & set(quantized)), None)
    if plain is not None or not blocks:
        where = f"{plain} has no quantized layer" if blocks else unknown
        raise QuantizationError(f"kv_cache: {where}", LEAVE_OUT)
