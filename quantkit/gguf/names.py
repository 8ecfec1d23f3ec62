"""Where each tensor of a model lies in a GGUF file, and the file's tensor as transformers has it.

Names of tensors are those of the package gguf, asked with what the checkpoint calls them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from quantkit.checkpoint.names import Names
from quantkit.errors import SourceError
from quantkit.gguf.architecture import Architecture, architecture_for
from quantkit.gguf.head import GIVE_FLOAT, OTHER_FORMAT, GGUFHead
from quantkit.gguf.layouts import AS_IT_IS, Heads, Layout
from quantkit.gguf.rope import ROPE_TENSORS
from quantkit.gguf.tensors import dequantized

SUFFIXES = (".weight", ".bias")
TOWER = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?")
"""How the tensors of a language model begin that is part of another one."""
PREFIXES = ("", "model.", "transformer.", "gpt_neox.")
"""What files leave out before the names of a model's own tensors."""
STACKED = re.compile(r"(\.\d+\..*?)\.(\d+)(?=\.|$)")
"""In a name, the block and what comes before the number of one of several tensors that are stacked in the file."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint lies.

    Attributes:
        name: of the file's tensor.
        layout: how it lies there.
        heads: of the model.
        index: of a stack, which one it is.
    """

    name: str
    layout: Layout
    heads: Heads
    index: int | None = None

    @property
    def where(self) -> tuple[str, int | None]:
        """The file's tensor, and which one of a stack."""
        return self.name, self.index

    def to_file(self, tensor: torch.Tensor) -> torch.Tensor:
        """A float tensor as the file holds it."""
        return self.layout.to_file(tensor, self.heads)

    def read(self, head: GGUFHead, dtype: torch.dtype) -> torch.Tensor:
        """The inverse of :meth:`to_file`, of a file's tensor of any type.

        Raises:
            SourceError: see :func:`quantkit.gguf.tensors.dequantized`.
        """
        tensor = dequantized(head, self.name, dtype, index=self.index, less=self.layout.added)
        return self.layout.from_file(tensor, self.heads)

    def rows_to_file(self, rows: torch.Tensor) -> torch.Tensor:
        """Packed rows of a layer in the file's order."""
        return self.layout.rows_to_file(rows, self.heads)

    def rows_from_file(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`rows_to_file`."""
        return self.layout.rows_from_file(rows, self.heads)

    def shape(self, head: GGUFHead) -> tuple[int, ...]:
        """The shape that the tensor has in a checkpoint."""
        stored = head.tensors[self.name].shape
        return self.layout.shape_in_checkpoint(stored if self.index is None else stored[1:])


class Naming:
    """The places of one model's tensors.

    Args:
        architecture: of the file.
        config: of the model.
    """

    def __init__(self, architecture: Architecture, config: PreTrainedConfig) -> None:
        self.architecture = architecture
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        self._names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
        self._heads = architecture.heads(config)

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Naming:
        """Of the architecture as which a config's model is written."""
        return cls(architecture_for(config.model_type), config)

    def find(self, name: str) -> Place | None:
        """Where a tensor of a checkpoint lies; None for what has no place there."""
        name = TOWER.sub("model.", name)
        for part, known in self.architecture.renamed.items():
            name = name.replace(part, known)
        found = self._known(name)
        if found is not None:
            return Place(found, self._layout(found), self._heads)
        stacked = STACKED.search(name)
        found = stacked and self._known(name[: stacked.end(1)] + name[stacked.end() :])
        return Place(found, self._layout(found), self._heads, int(stacked[2])) if stacked and found else None

    def place(self, name: str) -> Place:
        """Where a tensor lies.

        Raises:
            SourceError: it has no place there.
        """
        found = self.find(name)
        if found is None:
            what = f"a GGUF file of a {self.architecture.name} model has no place for {name}"
            raise SourceError(what, OTHER_FORMAT)
        return found

    def _known(self, name: str) -> str | None:
        bare = name.removeprefix("model.").removeprefix("transformer.")
        for each in (name, *(prefix + bare for prefix in PREFIXES)):
            found = self._names.get_name(each, try_suffixes=SUFFIXES)
            if found is not None:
                return str(found)
        return None

    def _layout(self, stored: str) -> Layout:
        part, suffix = stored.split(".")[-2:]
        named = self.architecture.layouts.get(part, AS_IT_IS)
        if part.endswith("_norm"):
            named = self.architecture.layouts.get("_norm", named)
        return named if suffix == "weight" or named.order is not None else AS_IT_IS


def model_of(config: dict[str, Any], head: GGUFHead) -> nn.Module:
    """The model of a file's config, on meta.

    Raises:
        SourceError: it cannot be built.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except (StrictDataclassError, ValueError, RuntimeError) as error:
        raise SourceError(f"{head.path} describes a model that cannot be built: {error}", GIVE_FLOAT) from error
    return model


def places_of(head: GGUFHead, config: dict[str, Any], architecture: Architecture) -> dict[str, Place]:
    """Name of each tensor that ``save_pretrained`` would write, to its place in the file; every tensor has its name.

    Args:
        head: of the file.
        config: see :func:`quantkit.gguf.config.model_config`.
        architecture: of the file.

    Raises:
        SourceError: the model cannot be built, or file and model do not have the same tensors.
    """
    model = model_of(config, head)
    naming, names, places = Naming(architecture, model.config), Names(model), {}
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    for parameter, shape in shapes.items():
        for name in names.sources(parameter):
            place = naming.find(name)
            stored = None if place is None else head.tensors.get(place.name)
            if place is None or stored is None:
                raise SourceError(f"{head.path} has no tensor '{place and place.name}' for {name}", GIVE_FLOAT)
            found = place.shape(head)
            if len(names.sources(parameter)) == 1 and found != shape:
                sizes = f"{list(found)} where {list(shape)} is wanted"
                raise SourceError(f"{head.path}: tensor '{place.name}' has the shape {sizes}", GIVE_FLOAT)
            places[name] = place
    unused = head.tensors.keys() - {place.name for place in places.values()} - set(ROPE_TENSORS)
    if unused:
        raise SourceError(f"{head.path} has the tensor '{min(unused)}', which {config['model_type']} has no place for")
    return places
