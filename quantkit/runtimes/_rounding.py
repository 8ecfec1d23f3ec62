"""A decoded model whose layers round their inputs, as the runtimes of its checkpoint do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import nn

from quantkit.engine.cache_rounding import CacheRounder, attention_modules, put_cache_rounder
from quantkit.engine.input_rounding import Rounder, put_rounder
from quantkit.engine.input_turning import put_turn
from quantkit.engine.layers import give_way
from quantkit.errors import EvaluationError
from quantkit.exports import Export
from quantkit.runtimes._model import TransformersModel
from quantkit.schemes.rounding import CACHE_SCALES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def rounders_of(export: Export) -> dict[str, Rounder]:
    """By layer what becomes of its inputs; layers that a runtime leaves them as they are have none.

    Raises:
        CheckpointError: a static scale is missing or broken.
    """
    asked = {layer: export.input_rounding(layer) for layer in export.schemes if layer != export.embedding}
    return {layer: Rounder(each, export.input_scale(layer)) for layer, each in asked.items() if each is not None}


def round_layers(loaded: TransformersModel, rounders: Mapping[str, Rounder], paths: Mapping[str, str]) -> None:
    """Let the layers of a model round their inputs, each expert's and each head's too, and let the model say so.

    Args:
        loaded: with all its weights.
        rounders: by the names of layers in the checkpoint.
        paths: by these names the places of layers in a model in which all are Linear modules.

    Raises:
        EvaluationError: the model has no such layer.
    """
    if not rounders:
        return
    check_layers(loaded.model, rounders, paths)
    put_linears(loaded.model)
    loaded.rounded_inputs = put_rounders(loaded.model, rounders, paths)


def put_cache_rounders(model: nn.Module, export: Export, paths: Mapping[str, str]) -> tuple[str, ...]:
    """Let attention compute with keys and values as a server stores them.

    Args:
        model: whose attention modules are there, with weights or without.
        export: the checkpoint.
        paths: by the names of layers in the checkpoint their places in the model.

    Returns:
        What the model says of it.

    Raises:
        EvaluationError: a module has no scales, or the model has no module for some.
    """
    if export.cache is None:
        return ()
    modules, (of_keys, _) = attention_modules(model), CACHE_SCALES
    for name in [each.removesuffix(of_keys) for each in export.cache_scales() if each.endswith(of_keys)]:
        layer = next((each for each in paths if each.startswith(f"{name}.")), "")
        module = modules.get(paths[layer].removesuffix(layer.removeprefix(name)) if layer else name)
        if module is None:
            raise EvaluationError(
                f"{type(model).__name__} has no attention {name}, for whose keys and values the checkpoint has scales",
                "score it with a runtime that loads it",
            )
        key_scale, value_scale = (export.float_tensor(f"{name}{end}").float() for end in CACHE_SCALES)
        put_cache_rounder(module, CacheRounder(export.cache, (key_scale, value_scale)))
    return (export.cache.describe(),)


def put_turns(model: nn.Module, export: Export, paths: Mapping[str, str]) -> None:
    """Let the layers of a model be given their inputs turned, as the file asks for.

    Args:
        model: whose layers are there, with weights or without.
        export: the checkpoint.
        paths: by the names of layers in the checkpoint their places in the model.

    Raises:
        EvaluationError: the model has no such layer.
    """
    places = {**{path: path for path in paths.values()}, **paths}
    check_layers(model, export.turns, places)
    for layer, size in export.turns.items():
        put_turn(model.get_submodule(places[layer]), size)


def check_layers(model: nn.Module, asked: Collection[str], paths: Collection[str]) -> None:
    """Refuse to round or turn inputs of layers that a model has not.

    Raises:
        EvaluationError: with the first.
    """
    lacking = sorted(set(asked) - set(paths))
    if lacking:
        raise EvaluationError(
            f"{type(model).__name__} has no layer {lacking[0]}, whose inputs the checkpoint has rounded or turned",
            "score it with a runtime that loads it",
        )


def put_rounders(model: nn.Module, rounders: Mapping[str, Rounder], paths: Mapping[str, str]) -> tuple[str, ...]:
    """Let layers, all of which are Linear modules, round their inputs; returns to what they do, in words."""
    for layer, rounder in rounders.items():
        put_rounder(model.get_submodule(paths[layer]), rounder)
    return tuple(sorted({each.rounding.describe() for each in rounders.values()}))


def put_linears(model: PreTrainedModel) -> None:
    """Put Linear modules, whose weights are views, in the place of whatever else provides layers of a loaded model."""
    whole = dict(model.named_parameters(remove_duplicate=False))
    for name, part in give_way(model).items():
        path, _, leaf = name.rpartition(".")
        view = nn.Parameter(part.cut(whole[part.parameter].data), requires_grad=False)
        setattr(model.get_submodule(path), leaf, view)
