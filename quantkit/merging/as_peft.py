"""An adapter as PEFT loads it into a base: in its own folder, or written again by the names that the base has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from quantkit.checkpoint import SINGLE_FILE, ShardWriter
from quantkit.checkpoint.adapter_folder import CONFIG, PREFIX, WEIGHTS
from quantkit.merging.adapter import WRAPPED_BASE, Adapter
from quantkit.merging.base import Base
from quantkit.merging.places import NESTED
from quantkit.system.artifacts import read_json, write_json


def without_place(adapter: Adapter, base: Base) -> str | None:
    """A layer of the adapter that is one in the base's file and none in its model, so that PEFT finds none; else None.

    So it is with the experts of files that hold them one by one, of which transformers makes a stack.
    """
    known = base.names.shapes()
    return next((module for module in adapter.contents.lora if f"{module}.weight" not in known), None)


def for_peft(adapter: Adapter, base: Base, folder: Path) -> Path:
    """The folder from which PEFT loads an adapter into its base.

    Where adapter and base call a layer differently, or the adapter's pattern of layers is not to be matched, it is
    ``folder``, into which the adapter is written with names of the base, every layer by its own.

    Args:
        adapter: placed in the base.
        base: it.
        folder: an empty one.
    """
    if adapter.config.tells_layers and not adapter.contents.renamed:
        return adapter.folder
    keys = dict(_named(adapter))
    with ShardWriter(folder, max_shard_bytes=1 << 62) as writer:
        for name, key in keys.items():
            writer.declare(f"{PREFIX}{name}", adapter.reader.dtype(key), adapter.reader.shape(key))
        for name, key in keys.items():
            writer.write(f"{PREFIX}{name}", adapter.reader.read(key))
    (folder / SINGLE_FILE).rename(folder / WEIGHTS)
    contents, config = adapter.contents, adapter.config
    called = {module: contents.called[module] for module in contents.lora}
    called |= {name: f"{stack.module}.{name.rpartition('.')[2]}" for name, stack in contents.stacks.items()}
    layers = set(base.layers)
    given = {
        "target_modules": [module for module in contents.lora if module in layers],
        "target_parameters": [
            *(f"{module}.weight" for module in contents.lora if module not in layers),
            *contents.stacks,
        ],
        "rank_pattern": {own: config.rank(name) for own, name in called.items() if config.rank(name) != config.lora.r},
        "alpha_pattern": {
            own: config.alpha(name) for own, name in called.items() if config.alpha(name) != config.lora.lora_alpha
        },
    }
    left_out = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))
    write_json(folder / CONFIG, {**read_json(adapter.folder / CONFIG), **left_out, **given})
    return folder


def _named(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """By what PEFT calls it in the base, the key of every tensor in the adapter."""
    contents = adapter.contents
    for module, parts in contents.lora.items():
        for part, key in parts.items():
            yield f"{module}.{part}{'.weight' if key.endswith('_vector.weight') else ''}", key
    for module, key in contents.tokens.items():
        yield f"{module}.token_adapter.trainable_tokens_delta", key
    for name, whole in contents.whole.items():
        wrapped = WRAPPED_BASE.search(whole.key)
        module, _, leaf = name.rpartition(".")
        yield f"{module}.{wrapped[1]}.{leaf}" if wrapped else name, whole.key
    depths: dict[str, int] = {}
    for parameter, stack in reversed(contents.stacks.items()):
        module = parameter.rpartition(".")[0]
        own = f"{module}{NESTED * depths.get(module, 0)}"
        depths[module] = depths.get(module, 0) + 1
        yield f"{own}.lora_A.weight", stack.first
        yield f"{own}.lora_B.weight", stack.second
