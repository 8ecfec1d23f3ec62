"""One layer's merge, by PEFT itself: a model of this layer alone, its adapter put in and merged; and NF4 before it.

All that PEFT does to a layer (ranks and scalings by pattern, rsLoRA, DoRA, biases, transposed weights, trained rows) is
so its own arithmetic, in float32. A QLoRA adapter is added to what NF4 leaves of the weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, TrainableTokensConfig, inject_adapter_in_model, set_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantkit.errors import SourceError
from quantkit.merging.adapter import Adapter
from quantkit.numerics.grid_search import encode, quantized, range_grid
from quantkit.schemes.codebook import Nf4Scheme

NF4 = Nf4Scheme(group_size=64, double_quant=True)
"""The scheme of bitsandbytes' ``bnb_4bit_use_double_quant``; the codes are the same."""
NAME = "default"
"""The adapter's name in PEFT meanwhile."""


@dataclass(slots=True)
class LayerWeights:
    """A layer's parameters, float32.

    Attributes:
        weight: as the checkpoint stores it.
        bias: may be None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None


def add_adapter(layer: LayerWeights, adapter: Adapter, module: str) -> LayerWeights:
    """The layer with the adapter's change of ``module`` added, times the adapter's weight.

    Args:
        layer: its tensors may be changed in place.
        adapter: that has a low-rank part for the module.
        module: name of the module.

    Raises:
        SourceError: the shapes do not fit, or the layer lacks the bias that is changed.
        CheckpointError: the adapter holds a NaN or an infinity.
    """
    parts, called = adapter.contents.lora[module], adapter.contents.called.get(module, module)
    _check_shapes(layer, adapter, module)
    base = _bare_layer(layer, "lora_embedding_A" in parts, transposed=bool(adapter.config.lora.fan_in_fan_out))
    state = {f"{called}.{part}": adapter.read(key).float() for part, key in parts.items()}
    tuned = _injected(adapter.config.for_module(called), called, base, state)
    if adapter.weight != 1:
        tuned.scaling[NAME] *= adapter.weight
    return _merged(tuned, base)


def replace_rows(layer: LayerWeights, adapter: Adapter, module: str) -> LayerWeights:
    """An embedding with the rows that the adapter trained (``trainable_token_indices``).

    Raises:
        SourceError: the rows are not there.
        CheckpointError: the adapter holds a NaN or an infinity.
    """
    rows = adapter.token_rows(module)
    delta = adapter.read(adapter.contents.tokens[module]).float()
    if max(rows) >= layer.weight.shape[0] or tuple(delta.shape) != (len(rows), layer.weight.shape[1]):
        raise SourceError(
            f"adapter {adapter.origin} trained {len(rows)} rows up to {max(rows)} of {module}, stored as "
            f"{list(delta.shape)}, and the base's are {list(layer.weight.shape)}",
            "give the base that it was trained on",
        )
    base = _bare_layer(layer, embedding=True, transposed=False)
    config = TrainableTokensConfig(token_indices=rows, target_modules=[module], init_weights=False)
    return _merged(_injected(config, module, base, {f"{module}.trainable_tokens_delta": delta}), base)


def _check_shapes(layer: LayerWeights, adapter: Adapter, module: str) -> None:
    parts, reader = adapter.contents.lora[module], adapter.reader
    rows, columns = layer.weight.shape
    if adapter.config.lora.fan_in_fan_out and "lora_embedding_A" not in parts:
        rows, columns = columns, rows
    wanted = {
        "lora_A.weight": (1, columns),
        "lora_B.weight": (0, rows),
        "lora_B.bias": (0, rows),
        "lora_embedding_A": (1, rows),
        "lora_embedding_B": (0, columns),
    }
    for part, key in parts.items():
        axis, size = wanted.get(part, (0, reader.shape(key)[0]))
        if reader.shape(key)[axis] != size:
            raise SourceError(
                f"adapter {adapter.origin}: tensor '{key}' has the shape {list(reader.shape(key))}, which does not fit "
                f"the base's {list(layer.weight.shape)}",
                "give the base that it was trained on",
            )
    if "lora_B.bias" in parts and layer.bias is None:
        raise SourceError(
            f"adapter {adapter.origin} adds a bias to {module}, which has none (lora_bias)",
            "such an adapter cannot be merged",
        )


def _bare_layer(layer: LayerWeights, embedding: bool, transposed: bool) -> nn.Module:
    """A module of the layer's kind that holds the layer's own tensors."""
    rows, columns = layer.weight.shape
    with torch.device("meta"):
        module: nn.Module
        if embedding:
            module = nn.Embedding(rows, columns)
        elif transposed:
            module = Conv1D(columns, rows)
        else:
            module = nn.Linear(columns, rows, bias=layer.bias is not None)
    _set(module, "weight", layer.weight)
    if layer.bias is not None:
        _set(module, "bias", layer.bias)
    elif transposed and not embedding:
        module.register_parameter("bias", None)
    return module


def _set(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(tensor, requires_grad=False))


def _injected(config: PeftConfig, module: str, base: nn.Module, state: Mapping[str, torch.Tensor]) -> Any:
    """PEFT's layer around ``base``, in a model in which it lies at the path ``module``, with the adapter's tensors."""
    model = nn.Module()
    *path, leaf = module.split(".")
    parent = model
    for part in path:
        child = nn.Module()
        parent.add_module(part, child)
        parent = child
    parent.add_module(leaf, base)
    # PEFT draws its beginnings from the global generator and warns of what has been checked before.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, model, adapter_name=NAME)
        result: Any = set_peft_model_state_dict(model, dict(state), adapter_name=NAME)
    if result.unexpected_keys:
        raise SourceError(f"PEFT has no place for '{result.unexpected_keys[0]}'", "pip install --upgrade peft")
    return model.get_submodule(module)


@torch.no_grad()
def _merged(tuned: Any, base: nn.Module) -> LayerWeights:
    tuned.merge(safe_merge=False, adapter_names=[NAME])
    parameters = dict(base.named_parameters())
    return LayerWeights(parameters["weight"].data, parameters["bias"].data if "bias" in parameters else None)


def nf4_round_trip(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight rounded to NF4 with double quantization and decoded again, as a QLoRA training sees it.

    Args:
        weight: ``[out_features, in_features]`` of a float dtype.
        dtype: in which the model was loaded for training and the codes are decoded, so that values are rounded to it
            before and after.

    Returns:
        float32 of the same shape.
    """
    rounded = weight.to(dtype).float().reshape(-1)
    blocks = nn.functional.pad(rounded, (0, -rounded.numel() % NF4.group_size)).view(-1, NF4.group_size)
    grid = range_grid(blocks, NF4, torch.float32)
    found = quantized(encode(blocks, grid, NF4), grid, NF4).dequantize(torch.float32)
    return found.view(-1)[: rounded.numel()].view(weight.shape).to(dtype).float()
