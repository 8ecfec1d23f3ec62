"""Read a checkpoint that is one GGUF file."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoConfig

from quantkit.errors import CheckpointError, SourceError
from quantkit.exports.base import Export
from quantkit.formats.gguf import Gguf
from quantkit.gguf.architecture import architecture_of
from quantkit.gguf.config import EMBEDDING, generation_config, model_config
from quantkit.gguf.head import GGUFTensor, read_head
from quantkit.gguf.names import Naming, Place, Spread, places_of
from quantkit.gguf.tensors import FLOATS, stays_whole
from quantkit.gguf.tokenizer_reader import write_tokenizer
from quantkit.gguf.types import scheme_of, type_of
from quantkit.schemes import QuantizedWeight, Scheme, scheme_from_json
from quantkit.system.artifacts import write_json

SCHEMES_KEY, VERSION_KEY = "quantkit.schemes", "quantkit.version"
"""Metadata of files that quantkit wrote: the layers' schemes as JSON, and its version."""
BLOCKS = "weight"
"""The suffix of a layer's packed blocks."""


class GgufExport(Export):
    """One GGUF file, by quantkit or another tool.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is broken, or holds a model or a type that quantkit does not read.
        SchemeError: it names a scheme that quantkit does not have.
    """

    format = Gguf.name

    def __init__(self, path: Path) -> None:
        self.path = path
        with _as_checkpoint_errors():
            self._head = read_head(path)
            self._config = model_config(self._head, torch.float16)
            self._places = places_of(self._head, self._config, architecture_of(self._head), apart=True)
        self._config["dtype"] = str(self._float_dtype()).removeprefix("torch.")
        self.schemes = self._schemes()
        self._layers = {self._pieces(layer)[0].where: layer for layer in self.schemes}
        self.embedding = self._layers.get((EMBEDDING, None))
        self.made_by = self._author()
        self._tokenizer: Path | None = None

    def config(self) -> dict[str, Any]:
        """``config.json`` of the model, told from the file's metadata."""
        return dict(self._config)

    def tokenizer_folder(self) -> Path:
        """A temporary folder with the tokenizer and the config, which goes when this object does."""
        if self._tokenizer is None:
            folder = Path(tempfile.mkdtemp(prefix="quantkit-tokenizer-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            with _as_checkpoint_errors():
                write_tokenizer(self._head, folder)
                write_json(folder / "generation_config.json", generation_config(self._head))
            write_json(folder / "config.json", self._config)
            self._tokenizer = folder
        return self._tokenizer

    def weight(self, layer: str) -> QuantizedWeight:
        """A packed layer, its rows in the order of transformers."""
        return Gguf().unpack({BLOCKS: self.blocks(layer)}, self.schemes[layer])

    def blocks(self, layer: str) -> torch.Tensor:
        """The raw blocks of a packed layer, uint8 ``[rows, row_bytes]``, its rows in the order of transformers.

        Raises:
            CheckpointError: the file became shorter.
        """
        place, found = self._places[f"{layer}.weight"], [self._rows(each) for each in self._pieces(layer)]
        return place.joined(found) if isinstance(place, Spread) else found[0]

    def named(self, place: Place) -> str:
        """The layer that lies in a place, by its name here, which its origin may call otherwise."""
        return self._layers[place.where]

    def float_names(self) -> list[str]:
        """All parameters but the weights of packed layers."""
        return [name for name in self._places if name.removesuffix(".weight") not in self.schemes]

    def float_shape(self, name: str) -> tuple[int, ...]:
        """From the file's head."""
        return self._places[name].shape(self._head)

    def float_dtype(self, name: str) -> torch.dtype:
        """From the file's head; of what lies packed and is no layer, that of the other matrices."""
        kind = self._tensor(name).kind
        return FLOATS[kind] if kind in FLOATS else self._float_dtype()

    def float_tensor(self, name: str) -> torch.Tensor:
        """As the file holds it, lying as in a checkpoint of transformers."""
        with _as_checkpoint_errors():
            return self._places[name].read(self._head, self.float_dtype(name))

    def shape(self, layer: str) -> tuple[int, int]:
        """From the file's head."""
        shapes = [self._head.tensors[place.name].shape for place in self._pieces(layer)]
        return sum(shape[-2] for shape in shapes), shapes[0][-1]

    def layer_bytes(self, layer: str) -> int:
        """From the file's head."""
        return sum(self._bytes(place) for place in self._pieces(layer))

    def files(self) -> list[Path]:
        """The file, or its parts."""
        return list(self._head.files)

    def _tensor(self, name: str) -> GGUFTensor:
        return self._head.tensors[self._places[name].name]

    def _pieces(self, layer: str) -> tuple[Place, ...]:
        """Where a packed layer lies."""
        place = self._places[f"{layer}.weight"]
        return place.places if isinstance(place, Spread) else (place,)

    def _bytes(self, place: Place) -> int:
        tensor = self._head.tensors[place.name]
        return tensor.nbytes if place.index is None else tensor.nbytes // tensor.shape[0]

    def _rows(self, place: Place) -> torch.Tensor:
        """The packed rows that lie in a place."""
        tensor, nbytes = self._head.tensors[place.name], self._bytes(place)
        start = tensor.start + (place.index or 0) * nbytes
        packed = numpy.fromfile(tensor.file, dtype=numpy.uint8, count=nbytes, offset=start)
        if packed.size < nbytes:
            raise CheckpointError(f"{tensor.file} ends inside tensor '{tensor.name}'", "download the file again")
        return place.rows_from_file(torch.from_numpy(packed).view(tensor.shape[-2], -1))

    def _float_dtype(self) -> torch.dtype:
        """The dtype of the matrices that are float, where they have one; float16, that of the scales, elsewhere."""
        tensors = [self._tensor(name) for name in self._places]
        matrices = [each for each in tensors if len(each.shape) > 1 and not stays_whole(each.name)]
        kinds = {each.kind for each in matrices if each.kind in FLOATS}
        return FLOATS[kinds.pop()] if len(kinds) == 1 else torch.float16

    def _schemes(self) -> dict[str, Scheme]:
        """The scheme of each packed layer: as quantkit noted it, or else by its type."""
        noted, found = self._noted(), {}
        for name, place in self._places.items():
            tensor, first = self._tensor(name), place.places[0] if isinstance(place, Spread) else place
            if tensor.kind in FLOATS or (isinstance(place, Spread) and not place.has_rows):
                continue
            layer = name.removesuffix(".weight")
            scheme = noted.get(first.where) or scheme_of(tensor.kind.name)
            if scheme is None or name == layer or len(tensor.shape) != (2 if first.index is None else 3):
                raise CheckpointError(
                    f"{self.path}: quantkit does not read tensor '{tensor.name}', {tensor.kind.name} of the shape "
                    f"{list(tensor.shape)}",
                    "give a file of another type",
                )
            if type_of(scheme) != tensor.kind.name:
                raise CheckpointError(f"{self.path}: tensor '{tensor.name}' is not of the scheme {scheme.describe()}")
            scheme.check_layer(*self.shape(layer))
            found[layer] = scheme
        return found

    def _noted(self) -> Mapping[tuple[str, int | None] | None, Scheme]:
        """The schemes that quantkit wrote into the file, by where the layers lie; none in a file of another tool."""
        text = self._head.metadata.get(SCHEMES_KEY)
        if text is None:
            return {}
        try:
            schemes = {layer: scheme_from_json(scheme) for layer, scheme in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path}: {SCHEMES_KEY} does not map layers to schemes", "download the file again"
            ) from error
        naming = Naming(architecture_of(self._head), AutoConfig.for_model(**self._config))
        found = ((naming.first(f"{layer}.weight"), scheme) for layer, scheme in schemes.items())
        return {place.where if place else None: scheme for place, scheme in found}

    def _author(self) -> str:
        version = self._head.metadata.get(VERSION_KEY)
        return f"quantkit {version}" if version else str(self._head.metadata.get("general.quantized_by", "unknown"))


@contextmanager
def _as_checkpoint_errors() -> Iterator[None]:
    """What is wrong with a file is wrong with a checkpoint here, and not with a source."""
    try:
        yield
    except SourceError as error:
        raise CheckpointError(error.problem, error.remedy) from error
