"""What is wrong with a checkpoint, or will surprise who loads it; a line each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.extra_tensors import left_out, parts_of_packed
from quantkit.checkpoint.names import Names
from quantkit.checkpoint.older_keys import numbers_of
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.tied import TIED, UNTIED, set_tied, tied_by_tensors
from quantkit.checkpoint.wrapped_names import own_names
from quantkit.errors import CheckpointError
from quantkit.exports import Export
from quantkit.exports.folder import FolderExport, read_config
from quantkit.formats import FORMATS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 3


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
    parts = parts_of_packed(names)
    if parts:
        yield f"{_listed(parts)}: parts of a packed layer that is not whole or not in the config"
    twice = [name for name in names if name.endswith(".weight") and name.removesuffix(".weight") in export.schemes]
    if twice:
        yield f"{_listed(twice)}: stored as float beside the packed layer"


def ignored_scales(export: Export) -> list[str]:
    """Names of scales of activations and caches that a file of another tool holds and its config does not ask for."""
    if not isinstance(export, FolderExport):
        return []
    asked = tuple(_asked_scales(read_config(export.path).get("quantization_config")))
    return [name for name in export.activation_scales() if not name.endswith(asked)]


def scale_problems(export: Export) -> Iterator[str]:
    """The same in words: transformers has no place for such tensors, which is what ``quantkit verify`` finds."""
    names = ignored_scales(export)
    if names:
        yield (
            f"{_listed(names)}: scales that the config does not ask for; transformers does not know them, so the file"
            " does not load whole there, as quantkit verify says; its weights do not depend on them"
        )


def _asked_scales(quantization: Any) -> Iterator[str]:
    """Ends of the names of scales that a config asks for: of inputs that are not rounded anew each time, and caches."""
    if not isinstance(quantization, Mapping):
        return
    for key, value in quantization.items():
        if key == "activation_scheme" and value == "static":
            yield from (".input_scale", ".output_scale")
        elif key in ("input_activations", "output_activations") and isinstance(value, Mapping):
            if value.get("dynamic") is not True:
                kind = key.partition("_")[0]
                yield from (f".{kind}_scale", f".{kind}_zero_point", f".{kind}_global_scale")
        elif key.startswith("kv_cache") and value:
            yield from (f".{each}_{part}" for each in "qkv" for part in ("scale", "zero_point"))
        else:
            yield from _asked_scales(value)


def float_problems(config: Mapping[str, Any], reader: CheckpointReader) -> list[str]:
    """How the tensors of a float model differ from those of the class that the config names, in names and number."""
    model = _built(config)
    if isinstance(model, str):
        return [] if own_code(config) else [model]
    shapes = {name: reader.shape(name) for name in reader.names()}
    try:
        called = own_names(model, shapes)
    except CheckpointError as error:
        return [error.problem]
    stored = {called.get(name, name): name for name in shapes}
    own = {name: shapes[each] for name, each in stored.items()}
    tied = tied_by_tensors(model, Names(model, own, own), lambda name: [reader.read(stored[name])])
    found = [f"{_listed(list(called))}: wrapped names, which quantkit takes apart"] if called else []
    if tied is not None:
        found.append(TIED if tied else UNTIED)
    return found + architecture_problems(config if tied is None else set_tied(config, tied), set(own), set())


def architecture_problems(config: Mapping[str, Any], floats: set[str], layers: set[str]) -> list[str]:
    """How the tensors differ from those of the model class that the config names.

    A class that transformers does not have is a problem of its own.

    Args:
        config: ``config.json``.
        floats: names of the float tensors.
        layers: names of the packed layers.
    """
    from quantkit.engine.layers import give_way

    model = _built(config)
    if isinstance(model, str):
        return [] if own_code(config) else [model]
    names = Names(model, floats | {f"{layer}.weight" for layer in layers})
    names.divide(give_way(model))
    text = model.config.get_text_config()  # a config of several parts may leave it to its text's
    ties = getattr(model.config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False))
    tied = getattr(model, "all_tied_weights_keys", None) or () if ties else ()
    optional = {names.tensor(name) for name in tied}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    lacking, foreign = names.unmatched()
    missing = [name for name in lacking if name not in optional]
    unknown = [name for name in foreign if not any(re.search(each, name) for each in ignored)]
    dropped = left_out(unknown, model)
    unknown = [name for name in unknown if name not in dropped]
    return [
        *([f"{_listed(missing)}: tensors that the model needs and the checkpoint lacks"] if missing else []),
        *([f"{_listed(unknown)}: tensors that the model does not know"] if unknown else []),
        *([f"{_listed(dropped)}: follow from the config or served training alone; not needed"] if dropped else []),
    ]


def own_code(config: Mapping[str, Any]) -> str:
    """The model class that only the Python code beside a checkpoint has, which is not run to look at it; or nothing."""
    if not config.get("auto_map"):
        return ""
    import transformers

    names = config.get("architectures") or [""]
    return "" if hasattr(transformers, str(names[0])) else str(names[0])


def _built(config: Mapping[str, Any]) -> PreTrainedModel | str:
    """The model of the class that a config names, on meta; or why there is none."""
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    names = config.get("architectures") or []
    cls = getattr(transformers, str(names[0]), None) if names else None
    if cls is None or not hasattr(cls, "_from_config"):
        return f"transformers {transformers.__version__} has no model class {names[0] if names else '(none is named)'}"
    try:
        with torch.device("meta"):
            model: PreTrainedModel = cls._from_config(cls.config_class.from_dict(numbers_of(dict(config))))
    except (
        ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, StrictDataclassError,
    ) as error:  # fmt: skip  # of values that nobody foresaw
        return f"transformers cannot build {names[0]} from the config: {str(error).splitlines()[0]}"
    return model


def _listed(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
