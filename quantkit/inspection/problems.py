"""What is wrong with a checkpoint, or will surprise who loads it; a line each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quantkit.exports import Export
from quantkit.formats import FORMATS

SHOWN = 3
PACKED_SUFFIXES = (
    ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale", ".qweight",
    ".qzeros", ".scales", ".g_idx", ".W_q", ".SCB", ".weight_format", ".absmax", ".quant_map",
)  # fmt: skip
"""Ends of names that only parts of packed layers have."""


def fused_problems(export: Export) -> Iterator[str]:
    """Layers that servers load as one matrix and that differ in scheme: vLLM refuses such a file, or misreads it."""
    fused = FORMATS.get(export.format).fused
    floats = {name.removesuffix(".weight") for name in export.float_names() if name.endswith(".weight")}
    parents = dict.fromkeys(name.rpartition(".")[0] for name in export.schemes)
    for parent in parents:
        for leaves in fused:
            there = [leaf for leaf in leaves if f"{parent}.{leaf}" in export.schemes or f"{parent}.{leaf}" in floats]
            found = {leaf: export.schemes.get(f"{parent}.{leaf}") for leaf in there}
            if len(set(found.values())) > 1:
                words = ", ".join(f"{leaf} is {each.describe() if each else 'float'}" for leaf, each in found.items())
                yield f"{parent}: {words}; servers such as vLLM load them as one matrix of one scheme"


def layer_problems(layers: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Scales that are not finite, and layers that are all zero."""
    for layer in layers:
        scales = layer.get("scales")
        if scales is None:
            continue
        if scales["non_finite"]:
            yield f"{layer['name']}: {scales['non_finite']} of {scales['count']} scales are not finite"
        elif layer["largest"] is None:
            yield f"{layer['name']}: all its weights are the same number"


def leftover_problems(export: Export) -> Iterator[str]:
    """Tensors that belong to no packed layer and to no float one either."""
    names = export.float_names()
    parts = [name for name in names if name.endswith(PACKED_SUFFIXES)]
    if parts:
        yield f"{_listed(parts)}: parts of a packed layer that is not whole or not in the config"
    twice = [name for name in names if name.endswith(".weight") and name.removesuffix(".weight") in export.schemes]
    if twice:
        yield f"{_listed(twice)}: stored as float beside the packed layer"


def architecture_problems(config: Mapping[str, Any], floats: set[str], layers: set[str]) -> list[str]:
    """How the tensors differ from those of the model class that the config names.

    Classes whose checkpoints have other names than their modules cannot be compared, and are not; a class that
    transformers does not have is a problem of its own.

    Args:
        config: ``config.json``.
        floats: names of the float tensors.
        layers: names of the packed layers.
    """
    found = _parameters(config)
    if isinstance(found, str):
        return [found]
    names, optional = found
    stored = floats | {f"{layer}.weight" for layer in layers}
    missing, unknown = sorted(names - stored - optional), sorted(stored - names)
    if missing and unknown and len(missing) + len(unknown) > len(names) // 2:
        return []  # another convention of names: nothing can be said
    return [
        *([f"{_listed(missing)}: tensors that the model needs and the checkpoint lacks"] if missing else []),
        *([f"{_listed(unknown)}: tensors that the model does not know"] if unknown else []),
    ]


def _parameters(config: Mapping[str, Any]) -> tuple[set[str], set[str]] | str:
    """Names of the parameters and buffers of the model class, and of those that may be absent; or why not."""
    import torch
    import transformers

    names = config.get("architectures") or []
    cls = getattr(transformers, str(names[0]), None) if names else None
    if cls is None or not hasattr(cls, "_from_config"):
        return f"transformers {transformers.__version__} has no model class {names[0] if names else '(none is named)'}"
    try:
        parsed = cls.config_class.from_dict(dict(config))
        with torch.device("meta"):
            model = cls._from_config(parsed)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        return f"transformers cannot build {names[0]} from the config: {str(error).splitlines()[0]}"
    tied = set(getattr(model, "all_tied_weights_keys", None) or ()) if parsed.tie_word_embeddings else set()
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    known = set(model.state_dict())
    return {name for name in known if not any(re.search(each, name) for each in ignored)}, tied


def _listed(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
