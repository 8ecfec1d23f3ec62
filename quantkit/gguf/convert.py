"""A GGUF file made into a float checkpoint that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.checkpoint import ShardWriter
from quantkit.errors import SourceError
from quantkit.gguf.config import ROPE_FACTORS, generation_config, model_config
from quantkit.gguf.head import GIVE_FLOAT, GGUFHead
from quantkit.gguf.names import in_transformers_order, namer, rotated_heads
from quantkit.gguf.tensors_in import dequantized
from quantkit.gguf.tokenizer_in import write_tokenizer
from quantkit.system.artifacts import write_json


def convert_gguf(head: GGUFHead, folder: Path, dtype: torch.dtype) -> None:
    """Write the model of a GGUF file to ``folder`` with its config, tokenizer and chat template.

    Raises:
        SourceError: the file holds a model that quantkit cannot convert, or is broken.
        OutputError: the folder cannot be written.
    """
    config = model_config(head, dtype)
    parameters = parameters_of(head, config)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(head))
    write_tokenizer(head, folder)
    with ShardWriter(folder) as writer:
        for name, (_, shape) in parameters.items():
            writer.declare(name, dtype, shape)
        for name, (stored, _) in parameters.items():
            writer.write(name, in_transformers_order(dequantized(head, stored, dtype), heads_of(name, config)))


def heads_of(name: str, config: dict[str, Any]) -> int | None:
    """Heads of a parameter whose rows the file keeps in another order, see :func:`rotated_heads`."""
    return rotated_heads(config["model_type"], name, config["num_attention_heads"], config["num_key_value_heads"])


def parameters_of(head: GGUFHead, config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter name to its tensor in the file and its shape; every tensor of the file has its parameter.

    Args:
        head: of the file.
        config: see :func:`quantkit.gguf.config.model_config`.

    Raises:
        SourceError: the model cannot be built, or file and model do not have the same tensors.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except (StrictDataclassError, ValueError, RuntimeError) as error:
        raise SourceError(f"{head.path} describes a model that cannot be built: {error}", GIVE_FLOAT) from error
    stored_name = namer(config["model_type"], config["num_hidden_layers"])
    parameters: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        stored = stored_name(name)
        if stored is None or stored not in head.tensors:
            raise SourceError(f"{head.path} has no tensor '{stored}' for {name}", GIVE_FLOAT)
        if head.tensors[stored].shape != tuple(parameter.shape):
            shapes = f"{list(head.tensors[stored].shape)} where {list(parameter.shape)} is wanted"
            raise SourceError(f"{head.path}: tensor '{stored}' has the shape {shapes}", GIVE_FLOAT)
        parameters[name] = (stored, tuple(parameter.shape))
    unused = head.tensors.keys() - {stored for stored, _ in parameters.values()} - {ROPE_FACTORS}
    if unused:
        raise SourceError(f"{head.path} has the tensor '{min(unused)}', which {config['model_type']} has no place for")
    return parameters
