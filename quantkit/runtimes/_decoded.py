"""A quantized checkpoint as a float model, by the code of its own format.

The packed layers are decoded with :meth:`quantkit.exports.Export.decodable` and
:meth:`quantkit.schemes.Decodable.dequantize`, one at a time as transformers asks for them; every other tensor
comes as it lies on disk. So any format can be scored, on any device, whether or not a runtime for it is at hand.
What it computes is what the file says, the rounding of inputs too; its memory and speed are those of a float model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import EllipsisType, MappingProxyType
from typing import TYPE_CHECKING

import torch

from quantkit.checkpoint.model_class import build_model, config_for, loader
from quantkit.checkpoint.names import Names
from quantkit.engine.layers import give_way, linear_modules
from quantkit.exports import Export, open_export
from quantkit.exports.adapter import adapter_beside, read_terms
from quantkit.numerics.low_rank import LowRank
from quantkit.runtimes._checkpoint import check_checkpoint, translated, whole_config
from quantkit.runtimes._model import TransformersModel, whole
from quantkit.runtimes._rounding import put_cache_rounders, put_turns, round_layers, rounders_of
from quantkit.runtimes.base import LoadOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Promise:
    """A tensor that is read, and decoded, when it is asked for by ``promise[...]``, as a slice of a file is.

    Attributes:
        shape: of one that is put together of several layers; None for others.
    """

    def __init__(self, read: Callable[[], torch.Tensor], shape: tuple[int, ...] | None = None) -> None:
        self._read, self.shape = read, shape

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        return self._read()


def decoded_state(
    export: Export, dtype: torch.dtype, terms: Mapping[str, LowRank] = MappingProxyType({})
) -> dict[str, Promise]:
    """The state dict of the float model that a checkpoint stands for, none of its tensors read yet.

    Args:
        export: the checkpoint.
        dtype: of the decoded weights; other tensors come as they are.
        terms: by layer what is added to a decoded weight.
    """
    packed = {
        f"{layer}.weight": Promise(partial(_decoded, export, layer, dtype, terms.get(layer)))
        for layer in export.schemes
    }
    return packed | {name: Promise(partial(export.float_tensor, name)) for name in export.float_names()}


def load_decoded(path: Path, options: LoadOptions) -> TransformersModel:
    """The float model that a quantized checkpoint stands for, with the adapter beside it added to its weights.

    Raises:
        EvaluationError: a tensor is missing, unexpected or of the wrong shape, or cannot be decoded.
        QuantkitError: the format is unknown, or the files are broken.
    """
    check_checkpoint(path)
    export, adapter = open_export(path), adapter_beside(path)
    terms = {} if adapter is None else read_terms(adapter)
    with translated(path, "the model"):
        config = whole_config(path, trust_remote_code=options.trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        dtype = getattr(torch, options.dtype) if options.dtype else config.dtype or torch.float32
        with torch.device("meta"):
            empty = build_model(deepcopy(config), trust_remote_code=options.trust_remote_code)
        state = decoded_state(export, dtype, terms)
        names = layer_names(empty, state)
        model, found = loader(type(empty))(
            None,
            config=config_for(type(empty), config),
            state_dict=as_transformers_stores(names, state, set(export.float_names())),
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported by name
            output_loading_info=True,
        )
    loaded = whole(path, model, found, torch.device(options.device))
    paths = {names.layer(f"{path}.weight"): path for path, _ in linear_modules(empty)}
    put_turns(loaded.model, export, paths)
    round_layers(loaded, rounders_of(export), paths)
    loaded.rounded_inputs += put_cache_rounders(loaded.model, export, paths)
    return loaded


def layer_names(empty: PreTrainedModel, state: Collection[str]) -> Names:
    """What a model's parameters are called in a checkpoint, those of every layer by themselves.

    Args:
        empty: the model on meta, in which Linear modules stand in the place of whatever else provides layers from now.
        state: the names of the checkpoint.
    """
    names = Names(empty, state)
    names.divide(give_way(empty))
    return names


def as_transformers_stores(names: Names, state: dict[str, Promise], floats: Set[str]) -> dict[str, Promise]:
    """A state dict in which what checkpoints hold layer by layer is whole again where transformers needs it whole.

    Args:
        names: see :func:`layer_names`.
        state: by the names of the checkpoint.
        floats: those that lie there as the source had them, in transformers' own layout.
    """
    found = dict(state)
    for parameter, parts in names.parts().items():
        layers = {part: f"{names.layer(part)}.{part.rpartition('.')[2]}" for part in parts}
        whole = names.tensor(parameter)
        if whole not in floats and not names.are_stacked(parameter) and all(name in state for name in layers.values()):
            for name in layers.values():
                found.pop(name, None)
            shape = names.shapes()[parameter]
            found[whole] = Promise(partial(_assembled, names, parameter, state, layers), shape)
    return found


def _assembled(names: Names, parameter: str, state: dict[str, Promise], layers: dict[str, str]) -> torch.Tensor:
    return names.assemble(parameter, lambda part: state[layers[part]][...])


def _decoded(export: Export, layer: str, dtype: torch.dtype, term: LowRank | None) -> torch.Tensor:
    weight = export.decodable(layer).dequantize(torch.float32)
    return (weight if term is None else weight + term.product()).to(dtype)
