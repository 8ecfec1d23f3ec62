"""A GGUF file made into a float checkpoint that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.artifacts import write_json
from quantkit.checkpoint import ShardWriter
from quantkit.errors import SourceError
from quantkit.source.gguf_config import ROPE_FACTORS, generation_config, model_config
from quantkit.source.gguf_head import GIVE_FLOAT, GGUFHead
from quantkit.source.gguf_tensors import dequantized
from quantkit.source.gguf_tokenizer import write_tokenizer


def convert_gguf(head: GGUFHead, folder: Path, dtype: torch.dtype) -> None:
    """Write the model of a GGUF file to ``folder`` with its config, tokenizer and chat template.

    Raises:
        SourceError: the file holds a model that quantkit cannot convert, or is broken.
        OutputError: the folder cannot be written.
    """
    config = model_config(head, dtype)
    parameters = _parameters(head, config)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(head))
    write_tokenizer(head, folder)
    with ShardWriter(folder) as writer:
        for name, (_, shape) in parameters.items():
            writer.declare(name, dtype, shape)
        for name, (stored, _) in parameters.items():
            writer.write(name, _in_transformers_order(dequantized(head, stored, dtype), name, config))


def _parameters(head: GGUFHead, config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter name to its tensor in the file and its shape; every tensor of the file has its parameter."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except (StrictDataclassError, ValueError, RuntimeError) as error:
        raise SourceError(f"{head.path} describes a model that cannot be built: {error}", GIVE_FLOAT) from error
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config["model_type"])
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    parameters: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        stored = str(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if stored not in head.tensors:
            raise SourceError(f"{head.path} has no tensor '{stored}' for {name}", GIVE_FLOAT)
        if head.tensors[stored].shape != tuple(parameter.shape):
            shapes = f"{list(head.tensors[stored].shape)} where {list(parameter.shape)} is wanted"
            raise SourceError(f"{head.path}: tensor '{stored}' has the shape {shapes}", GIVE_FLOAT)
        parameters[name] = (stored, tuple(parameter.shape))
    unused = head.tensors.keys() - {stored for stored, _ in parameters.values()} - {ROPE_FACTORS}
    if unused:
        raise SourceError(f"{head.path} has the tensor '{min(unused)}', which {config['model_type']} has no place for")
    return parameters


def _in_transformers_order(tensor: torch.Tensor, name: str, config: dict[str, Any]) -> torch.Tensor:
    """Undo the order of rows in which llama.cpp keeps a llama's queries and keys.

    It rotates neighbouring rows of a head, and transformers rows that are half a head apart.
    """
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    layer = name.split(".")[-2]
    if config["model_type"] != "llama" or layer not in heads:
        return tensor
    pairs = tensor.view(heads[layer], -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
