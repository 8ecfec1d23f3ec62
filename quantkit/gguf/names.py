"""Where each tensor of a model lies in a GGUF file, and the file's tensor as transformers has it.

Names of tensors are those of the package gguf, asked with what the checkpoint calls them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from quantkit.checkpoint.model_class import BUILDING
from quantkit.checkpoint.names import Names
from quantkit.errors import SourceError
from quantkit.gguf.architecture import Architecture, architecture_for, model_types
from quantkit.gguf.head import GIVE_FLOAT, OTHER_FORMAT, GGUFHead
from quantkit.gguf.layouts import AS_IT_IS, Heads, Layout, Pieces
from quantkit.gguf.rope import ROPE_TENSORS
from quantkit.gguf.tensors import FLOATS, dequantized

SUFFIXES = (".weight", ".bias")
TOWER = re.compile(r"^(?:model\.)?(?:language|text)_model\.(?:model\.)?")
"""How the tensors of a language model begin that is part of another one."""
PREFIXES = ("", "model.", "transformer.", "gpt_neox.")
"""What files leave out before the names of a model's own tensors."""
UNFORESEEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
"""What the classes of models raise for values that nobody foresaw."""
STACKED = re.compile(r"(\.\d+\..*?)\.(\d+)(?=\.|$)")
"""In a name, the block and what comes before the number of one of several tensors that are stacked in the file."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint lies, or a piece of one.

    Attributes:
        name: of the file's tensor.
        layout: how it lies there.
        heads: of the model.
        index: of a stack, which one it is.
        pieces: how the tensor is cut where more than one place holds it.
        piece: which of the pieces lies here.
    """

    name: str
    layout: Layout
    heads: Heads
    index: int | None = None
    pieces: Pieces | None = None
    piece: int = 0

    @property
    def where(self) -> tuple[str, int | None]:
        """The file's tensor, and which one of a stack."""
        return self.name, self.index

    def to_file(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the file holds here of a float tensor."""
        return self.layout.to_file(self._own(tensor), self.heads)

    def shape_in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of that, for a float tensor of a shape."""
        if self.pieces is None:
            return self.layout.shape_in_file(shape)
        return tuple(self.to_file(torch.empty(shape, device="meta")).shape)

    def read(self, head: GGUFHead, dtype: torch.dtype) -> torch.Tensor:
        """The inverse of :meth:`to_file`, of a file's tensor of any type; of a piece, the piece.

        Raises:
            SourceError: see :func:`quantkit.gguf.tensors.dequantized`.
        """
        tensor = dequantized(head, self.name, dtype, index=self.index, values=self.layout.values)
        return self.layout.from_file(tensor, self.heads)

    def rows_to_file(self, rows: torch.Tensor) -> torch.Tensor:
        """What the file holds here of the packed rows of a layer, in the file's order."""
        return self.layout.rows_to_file(self._own(rows), self.heads)

    def rows_from_file(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`rows_to_file`."""
        return self.layout.rows_from_file(rows, self.heads)

    def shape(self, head: GGUFHead) -> tuple[int, ...]:
        """The shape that the tensor has in a checkpoint; of a piece, that of the piece."""
        stored = head.tensors[self.name].shape
        return self.layout.shape_in_checkpoint(stored if self.index is None else stored[1:])

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.pieces is None else self.pieces.cut(tensor, self.heads)[self.piece]


@dataclass(frozen=True, slots=True)
class Spread:
    """A tensor of a checkpoint that lies in several places of a file, as all its pieces."""

    places: tuple[Place, ...]

    @property
    def name(self) -> str:
        """Of the file's tensor that holds the first piece."""
        return self.places[0].name

    @property
    def has_rows(self) -> bool:
        """Whether each piece holds rows of a layer."""
        return all(place.pieces is not None and place.pieces.rows for place in self.places)

    def read(self, head: GGUFHead, dtype: torch.dtype) -> torch.Tensor:
        """The tensor, see :meth:`Place.read`."""
        return self.joined([place.read(head, dtype) for place in self.places])

    def shape(self, head: GGUFHead) -> tuple[int, ...]:
        """The shape that it has in a checkpoint.

        Raises:
            SourceError: the pieces do not fit each other.
        """
        shapes = [place.shape(head) for place in self.places]
        try:
            return tuple(self.joined([torch.empty(shape, device="meta") for shape in shapes]).shape)
        except (RuntimeError, IndexError) as error:
            raise SourceError(
                f"{head.path}: tensor '{self.name}' and those beside it have the shapes {shapes}", GIVE_FLOAT
            ) from error

    def joined(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """The tensor that the pieces are, as a checkpoint has them."""
        first = self.places[0]
        return pieces[0] if first.pieces is None else first.pieces.join(pieces, first.heads)


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
        """Where a tensor lies that lies in one piece.

        Raises:
            SourceError: it has no place there.
        """
        found = self.find(name)
        if found is None:
            what = f"a GGUF file of a {self.architecture.name} model has no place for {name}"
            raise SourceError(what, OTHER_FORMAT)
        return found

    def places(self, name: str) -> tuple[Place, ...]:
        """Where a tensor lies, in one piece or several.

        Raises:
            SourceError: it has no place there.
        """
        return self.spread(name) or (self.place(name),)

    def first(self, name: str) -> Place | None:
        """Where a tensor lies, or its first piece; None for what has no place there."""
        return next(iter(self.spread(name)), None) or self.find(name)

    def spread(self, name: str) -> tuple[Place, ...]:
        """Where the pieces of a tensor lie; none if it is not cut into pieces."""
        name = TOWER.sub("model.", name)
        for leaf, pieces in self.architecture.pieces.items():
            if name.endswith(leaf):
                stem = name.removesuffix(leaf)
                stored = [self._known(stem + part) or part for part in pieces.parts]
                return tuple(
                    Place(found, AS_IT_IS, self._heads, pieces=pieces, piece=each) for each, found in enumerate(stored)
                )
        return ()

    def in_file(self, name: str, head: GGUFHead) -> Place | Spread | None:
        """Where a tensor lies in a file; None if it is not there."""
        places = self.spread(name)
        if places and all(place.name in head.tensors for place in places):
            return Spread(places)
        whole = self.find(name)
        return whole if whole is not None and whole.name in head.tensors else None

    def _known(self, name: str) -> str | None:
        bare = name.removeprefix("model.").removeprefix("transformer.")
        for each in (name, *(prefix + bare for prefix in PREFIXES)):
            found = self._names.get_name(each, try_suffixes=SUFFIXES)
            if found is not None:
                return str(found)
        return None

    def _layout(self, stored: str) -> Layout:
        part, suffix = stored.split(".")[-2:] if stored.endswith(SUFFIXES) else (stored.split(".")[-1], "weight")
        named = self.architecture.layouts.get(part, AS_IT_IS)
        if part.endswith("_norm"):
            named = self.architecture.layouts.get("_norm", named)
        return named if suffix == "weight" or named.order is not None else AS_IT_IS


def kept_whole(layers: Iterable[str], config: PreTrainedConfig) -> list[str]:
    """The layers that a file holds in pieces of which some are no rows of theirs, so that they cannot be packed.

    Args:
        layers: names.
        config: of the model; of one that cannot be written none is named.
    """
    text = config.get_text_config(decoder=True)
    if text.model_type not in model_types():
        return []
    naming = Naming.of(text)
    places = {layer: naming.spread(f"{layer}.weight") for layer in layers}
    return [layer for layer, found in places.items() if found and not Spread(found).has_rows]


def model_of(config: dict[str, Any], head: GGUFHead) -> tuple[nn.Module, Names]:
    """The model of a file's config, on meta, and what its checkpoint calls its parameters.

    Raises:
        SourceError: it cannot be built.
    """
    try:
        with BUILDING, torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        return model, Names(model)
    except (StrictDataclassError, *UNFORESEEN) as error:
        raise SourceError(f"{head.path} describes a model that cannot be built: {error}", GIVE_FLOAT) from error


def places_of(
    head: GGUFHead, config: dict[str, Any], architecture: Architecture, *, apart: bool = False
) -> dict[str, Place | Spread]:
    """Name of each tensor that ``save_pretrained`` would write, to its place in the file; every tensor has its name.

    Args:
        head: of the file.
        config: see :func:`quantkit.gguf.config.model_config`.
        architecture: of the file.
        apart: whether the packed layers of a stack of experts are told one by one, by the names that layers have.

    Raises:
        SourceError: the model cannot be built, or file and model do not have the same tensors.
    """
    model, names = model_of(config, head)
    naming = Naming(architecture, model.config)
    places: dict[str, Place | Spread] = {}
    shapes = {name: tuple(each.shape) for name, each in _tensors(model)}
    for parameter, shape in shapes.items():
        sources = names.sources(parameter)
        for name in sources:
            place = naming.in_file(name, head)
            if place is None:
                wanted = naming.spread(name) or ((found,) if (found := naming.find(name)) else ())
                raise SourceError(f"{head.path} has no tensor '{wanted and wanted[0].name}' for {name}", GIVE_FLOAT)
            if len(sources) == 1 and place.shape(head) != shape:
                sizes = f"{list(place.shape(head))} where {list(shape)} is wanted"
                raise SourceError(f"{head.path}: tensor '{place.name}' has the shape {sizes}", GIVE_FLOAT)
            places |= _experts(place, parameter, head) if apart and _is_packed_stack(place, head) else {name: place}
    unused = head.tensors.keys() - set(_names(places.values())) - set(ROPE_TENSORS)
    blocks = config[architecture.key("num_hidden_layers")]
    unused -= {name for name in unused if _block(name) >= blocks}
    if unused:
        raise SourceError(f"{head.path} has the tensor '{min(unused)}', which {config['model_type']} has no place for")
    return places


def _block(name: str) -> int:
    """The block of a file's tensor. Beyond the model's own lie those that guess at further tokens."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of a model, and the buffers that checkpoints hold."""
    yield from model.named_parameters()
    stored = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def _names(places: Iterable[Place | Spread]) -> Iterator[str]:
    for place in places:
        yield from (each.name for each in place.places) if isinstance(place, Spread) else (place.name,)


def _is_packed_stack(place: Place | Spread, head: GGUFHead) -> bool:
    """Whether a tensor is a stack of experts of which any projection is packed."""
    if not isinstance(place, Spread):
        return False
    stacks = any(each.pieces is not None and each.pieces.leaves for each in place.places)
    return stacks and any(head.tensors[each.name].kind not in FLOATS for each in place.places)


def _experts(place: Place | Spread, parameter: str, head: GGUFHead) -> dict[str, Place | Spread]:
    """The layers of a stack of experts by their names."""
    found: dict[str, Place | Spread] = {}
    for each in place.places if isinstance(place, Spread) else ():
        leaf = each.pieces.leaves[each.piece] if each.pieces else ""
        for index in range(head.tensors[each.name].shape[0]):
            name = f"{parameter.rpartition('.')[0]}.{index}.{leaf}.weight"
            found[name] = Place(each.name, each.layout, each.heads, index)
    return found
