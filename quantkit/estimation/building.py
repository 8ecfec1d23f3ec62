"""The anatomy of a model, counted on the model that transformers builds without weights."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from quantkit.checkpoint.companions import code_files, copy_files
from quantkit.engine.float_parts import float_parts
from quantkit.engine.layers import Layer
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import SourceError
from quantkit.estimation.anatomy import Anatomy, Cache, Kind, Weight
from quantkit.estimation.trial import block_inputs, fill
from quantkit.estimation.whole_trial import try_all
from quantkit.system.artifacts import write_json

CONFIG = "config.json"
DTYPES = ("float32", "float16", "bfloat16")
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
"""Kinds of blocks, as configs of transformers call them, that keep keys and values of tokens."""
EXPERT = re.compile(r"\.\d+\.")
"""In a layer's path inside its block: it is one of a list, as experts are."""


def built(data: Mapping[str, Any], name: str, code: Path | None = None) -> Anatomy:
    """The anatomy of the model of a config.

    Of a model of several parts that transformers does not build as a whole, the text model alone is looked at.

    Args:
        data: as ``config.json`` of a float model has it.
        name: of the model, for messages.
        code: folder of a model whose Python code may run; None for none.

    Raises:
        SourceError: transformers cannot build it, or its config lacks what the cache depends on.
    """
    if not isinstance(data.get("model_type"), str):
        raise SourceError(f"the config of {name} has no model_type", f"give the {CONFIG} of a model")
    try:
        return _counted(_skeleton(data, name, code), name, _dtype(data), ())
    except SourceError:
        text = data.get("text_config")
        if not isinstance(text, Mapping):
            raise
    kind = text.get("model_type", f"{data['model_type']}_text")
    notes = (f"the parts of {name} beside its text model are left out",)
    return _counted(_skeleton({"model_type": kind, **text}, name), name, _dtype({**data, **text}), notes)


def _skeleton(data: Mapping[str, Any], name: str, code: Path | None = None) -> Skeleton:
    with tempfile.TemporaryDirectory(prefix="quantkit-config-") as scratch:
        write_json(Path(scratch) / CONFIG, dict(data))
        if code is not None:
            copy_files(code_files(code), code, Path(scratch))
        try:
            return Skeleton(Path(scratch), trust_remote_code=code is not None)
        except SourceError as error:
            problem = error.problem.replace(str(Path(scratch) / CONFIG), name)
            raise SourceError(problem, error.remedy) from error


def _dtype(data: Mapping[str, Any]) -> str:
    """The dtype of the weights; float32 where nothing is said, as transformers takes it."""
    text = data.get("text_config")
    for part in (data, text if isinstance(text, Mapping) else {}):
        found = part.get("dtype") or part.get("torch_dtype")
        if found in DTYPES:
            return str(found)
    return "float32"


def _counted(skeleton: Skeleton, name: str, dtype: str, notes: tuple[str, ...]) -> Anatomy:
    config: Any = skeleton.model.config.get_text_config()
    weights = tuple(_weights(skeleton))
    sizes = Counter(dict.fromkeys(range(len(skeleton.segments)), 0))
    for weight in weights:
        if weight.block is not None:
            sizes[weight.block] += weight.numel
    largest = [index for index in sizes if sizes[index] == max(sizes.values())][:2][-1]
    vocabulary, hidden = skeleton.text.get_input_embeddings().weight.shape
    heads = _optional(config, "num_attention_heads", name) or 0
    width = (_head_width(config, name) or hidden // heads) if heads else 0
    shared = _optional(config, "num_key_value_heads", name) or heads
    embedding, head = skeleton.embedding, skeleton.head
    inside = [layer for segment in skeleton.segments for layer in segment.layers]
    plain = tuple(_caches(config, name, len(skeleton.segments), shared, width))
    fill(skeleton)  # last, for it is of no other use then
    inputs, remarks = block_inputs(skeleton, largest)
    caches, shares, missed = _tried(skeleton, plain, config, name)
    return Anatomy(
        name=name,
        family=config.model_type,
        dtype=dtype,
        hidden=hidden,
        wide=_wide(inside, hidden, _optional(config, "num_experts_per_tok", name) or 1),
        queries=heads * width,
        keys=shared * width,
        vocabulary=vocabulary,
        blocks=len(skeleton.segments),
        weights=tuple(replace(weight, share=shares.get(weight.layer, 1.0)) for weight in weights),
        caches=caches,
        embedding=embedding.layers[0].name if embedding else "",
        head=head.layers[0].name if head else "lm_head",
        tied=bool(skeleton.tied),
        largest=largest,
        inputs=inputs,
        context=_optional(config, "max_position_embeddings", name),
        rope_factors=_rope_factors(config, width),
        notes=(*notes, *remarks, *missed),
    )


def _tried(
    skeleton: Skeleton, plain: tuple[Cache, ...], config: Any, name: str
) -> tuple[tuple[Cache, ...], dict[str, float], tuple[str, ...]]:
    """What blocks keep and the shares of layers by their names, by a run; where the model does not run, by its config.

    Args:
        skeleton: the model, after :func:`quantkit.estimation.trial.fill`.
        plain: what blocks keep by the config.
        config: of the text model.
        name: of the model.
    """
    try:
        trial = try_all(skeleton)
    except Exception as error:  # the code of any model, which may ask more of its numbers
        why = f"the model does not run without weights ({type(error).__name__}), so its cache is told by its config"
        return plain, {}, (f"{why}, and experts all count as active",)
    names = {layer.path: layer.name for segment in skeleton.segments for layer in segment.layers}
    shares = {names[path]: share for path, share in trial.shares.items()}
    if not trial.caches:
        return plain, shares, ("its blocks keep what they have seen to themselves, so its cache is told by its config",)
    latent = bool(_optional(config, "kv_lora_rank", name)) and len(plain) == len(trial.caches)
    caches = tuple(replace(kept, state=each.state) for kept, each in zip(plain, trial.caches, strict=False))
    return caches if latent else trial.caches, shares, ()


def _weights(skeleton: Skeleton) -> Iterator[Weight]:
    """Every parameter and every buffer that files hold, by its name in a checkpoint."""
    model, names = skeleton.model, skeleton.names
    text = {id(tensor) for tensor in _tensors(model.get_decoder()).values()}
    kinds: dict[str, tuple[Kind, int | None]] = {}
    kept = {f"{part.path}.weight": part.reason for part in float_parts(skeleton).values() if part.is_layer}
    for index, segment in enumerate(skeleton.segments):
        kinds |= dict.fromkeys(_tensors(segment.module, f"{segment.prefix}."), ("other", index))
        kinds |= {f"{layer.path}.weight": ("linear", index) for layer in segment.layers}
    if skeleton.head is not None:
        kinds[f"{skeleton.head.prefix}.weight"] = ("linear", None)
    if skeleton.embedding is not None:
        kinds[f"{skeleton.embedding.prefix}.weight"] = ("embedding", None)
    for path, tensor in _tensors(model).items():
        kind, block = kinds.get(path, ("other" if id(tensor) in text else "tower", None))
        yield Weight(names.written(path), tuple(tensor.shape), kind, block, keeps_float=kept.get(path))


def _tensors(module: nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """The parameters of a module, each once, and the buffers that its files hold."""
    held = frozenset(module.state_dict())
    found: dict[str, torch.Tensor] = {f"{prefix}{path}": tensor for path, tensor in module.named_parameters()}
    return found | {f"{prefix}{path}": tensor for path, tensor in module.named_buffers() if path in held}


def _value(config: Any, key: str) -> Any:
    """A value of a config; the largest where it differs between blocks."""
    try:
        return getattr(config, key, None)
    except AmbiguousGlobalPerLayerAttributeError:  # transformers refuses to name one for blocks that differ
        each = [getattr(block, key, None) for block in config.per_layer_config]
        return max((value for value in each if value is not None), default=None)


def _whole(config: Any, key: str, name: str) -> int:
    found = _value(config, key)
    if not isinstance(found, int) or found < 1:
        said = "does not say" if found is None else f"says {found!r} for"
        raise SourceError(f"the config of {name} {said} {key}", "a whole number is needed there")
    return found


def _optional(config: Any, key: str, name: str) -> int | None:
    return _whole(config, key, name) if _value(config, key) else None


def _head_width(config: Any, name: str) -> int | None:
    """Width of a head; of latent attention that of its keys, which a part with positions and one without make up."""
    if _optional(config, "kv_lora_rank", name):
        return _whole(config, "qk_nope_head_dim", name) + _whole(config, "qk_rope_head_dim", name)
    return _optional(config, "head_dim", name)


def _wide(layers: list[Layer], hidden: int, experts: int) -> int:
    """Width of what a token's MLP computes with at once; of experts, of all that a token goes to."""
    single, listed = [0], [0]
    for layer in layers:
        inside = EXPERT.sub(".", layer.path, count=1)  # the block's own number
        (listed if EXPERT.search(inside) else single).append(layer.shape[1])
    inner = [columns for columns in listed if columns != hidden] or listed
    return max(max(single), experts * max(inner))


def _caches(config: Any, name: str, blocks: int, shared: int, width: int) -> Iterator[Cache]:
    """What each block keeps of a token: keys and values of heads of a width, or the latent from which they are made."""
    values, words, heads = 2 * shared * width, f"(2 x {shared} heads x {width})", 2 * shared
    latent, window = _optional(config, "kv_lora_rank", name), _optional(config, "sliding_window", name)
    if latent:
        rope = _whole(config, "qk_rope_head_dim", name)
        values, words, heads = latent + rope, f"({latent} latent + {rope} rope)", 0
    kinds = getattr(config, "layer_types", None) or [SLIDING if window else FULL] * blocks
    windows = {FULL: None, SLIDING: window, CHUNKED: _optional(config, "attention_chunk_size", name)}
    for kind in kinds:
        known = kind in windows
        yield Cache(values, words, windows[kind], heads=heads) if known else Cache(0, f"({kind} keeps no tokens)")


def _rope_factors(config: Any, width: int) -> int:
    """Numbers that a GGUF file has for the rope of Llama 3.1 and later."""
    rope = getattr(config, "rope_parameters", None) or {}
    return width // 2 if isinstance(rope, Mapping) and rope.get("rope_type") == "llama3" else 0
