"""Names and row orders of a model's tensors, in GGUF files and in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.errors import SourceError
from quantkit.gguf.config import WRITTEN_AS
from quantkit.gguf.head import GIVE_FLOAT, OTHER_FORMAT, GGUFHead
from quantkit.gguf.rope import FACTORS

SUFFIXES = (".weight", ".bias")


class Naming:
    """Names and row orders of one model.

    llama.cpp rotates neighbouring rows of a head in the queries and keys of a llama, and transformers rows that are
    half a head apart: the file keeps these rows in another order.

    Args:
        config: its ``config.json``, with all defaults filled in.
        path: where the model lies, for messages.
    """

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self.architecture = WRITTEN_AS[config["model_type"]]
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
        self._heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        self._path = path

    def find(self, parameter: str) -> str | None:
        """What a GGUF file calls a parameter of transformers; None for what has no place there."""
        found = self._names.get_name(parameter, try_suffixes=SUFFIXES)
        return None if found is None else str(found)

    def name(self, parameter: str) -> str:
        """What a GGUF file calls a parameter.

        Raises:
            SourceError: it has no place there.
        """
        found = self.find(parameter)
        if found is None:
            what = f"a GGUF file of a {self.architecture} model has no place for {parameter}"
            raise SourceError(f"{self._path}: {what}", OTHER_FORMAT)
        return found

    def in_transformers_order(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """A GGUF file's tensor, packed or not, with its rows as transformers has them."""
        heads = self._turned(parameter)
        if heads is None:
            return tensor
        return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def in_gguf_order(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`in_transformers_order`."""
        heads = self._turned(parameter)
        if heads is None:
            return tensor
        return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def _turned(self, parameter: str) -> int | None:
        """Heads of a parameter whose rows have another order in the file."""
        layer = parameter.split(".")[-2] if "." in parameter else ""
        return self._heads.get(layer) if self.architecture == "llama" else None


def parameters_of(head: GGUFHead, config: dict[str, Any]) -> dict[str, str]:
    """Parameter of transformers to its tensor in the file, of the same shape; every tensor has its parameter.

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
    naming, parameters = Naming(config, head.path), {}
    for name, parameter in model.named_parameters():
        stored = naming.find(name)
        if stored is None or stored not in head.tensors:
            raise SourceError(f"{head.path} has no tensor '{stored}' for {name}", GIVE_FLOAT)
        if head.tensors[stored].shape != tuple(parameter.shape):
            shapes = f"{list(head.tensors[stored].shape)} where {list(parameter.shape)} is wanted"
            raise SourceError(f"{head.path}: tensor '{stored}' has the shape {shapes}", GIVE_FLOAT)
        parameters[name] = stored
    unused = head.tensors.keys() - set(parameters.values()) - {FACTORS}
    if unused:
        raise SourceError(f"{head.path} has the tensor '{min(unused)}', which {config['model_type']} has no place for")
    return parameters
