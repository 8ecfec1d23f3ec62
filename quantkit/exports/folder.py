"""A checkpoint that is a folder of safetensors with a ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.checkpoint.adapter_folder import adapter_in
from quantkit.checkpoint.extra_tensors import SCALES_OF_ACTIVATIONS
from quantkit.checkpoint.sizes import check_sizes
from quantkit.errors import CheckpointError
from quantkit.exports.base import Export
from quantkit.exports.manifest import FOREIGN, read_manifest
from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.schemes import Decodable, QuantizedWeight, Scheme, scheme_from_json
from quantkit.schemes.rounding import CACHE_SCALES, InputRounding
from quantkit.system.artifacts import read_json

W = TypeVar("W")


class FolderExport(Export):
    """Safetensors beside a ``config.json``; what quantkit wrote is read by its manifest, all else by its config.

    Args:
        folder: the checkpoint.

    Raises:
        CheckpointError: it is no quantized checkpoint, of a format that quantkit does not read, or broken.
        SchemeError: its manifest names a scheme that quantkit does not have.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._config = read_config(folder)
        self._reader = CheckpointReader(folder)
        manifest = read_manifest(folder)
        self._foreign = manifest is None or manifest.get(FOREIGN) is True
        if manifest is None or self._foreign:
            self._store, self.schemes = _read_foreign(folder, self._config, self._reader)
            author = _author(folder, self._config, self._store) if manifest is None else manifest["created_by"]
            self.made_by = str(author)
        else:
            self._store = FORMATS.get(manifest["format"])(_dtype(self._config))
            self.schemes = {name: scheme_from_json(scheme) for name, scheme in manifest["layers"].items()}
            self.embedding = manifest.get("embedding")
            if self.embedding is not None and (
                not isinstance(self.embedding, str) or self.embedding not in self.schemes
            ):
                raise CheckpointError(
                    f"the manifest of {folder} calls {self.embedding!r} the embedding, which is no layer of it",
                    "export the checkpoint again",
                )
            self.made_by = str(manifest.get("created_by", "quantkit"))
        said = self._config.get("quantization_config")
        self.cache = self._store.cache_rounding(said) if isinstance(said, dict) else None
        self.turns = self._store.turns_in(said) if isinstance(said, dict) else {}
        self.format = self._store.name
        self._names = {layer: self._packed_names(layer, scheme) for layer, scheme in self.schemes.items()}

    def config(self) -> dict[str, Any]:
        """The config without what it says of quantization."""
        return {key: value for key, value in self._config.items() if key != "quantization_config"}

    def tokenizer_folder(self) -> Path:
        """The folder itself."""
        return self.path

    def weight(self, layer: str) -> QuantizedWeight:
        """A packed layer, by the code of its format."""
        return self._read(layer, self._store_of(layer).unpack)

    def decodable(self, layer: str) -> Decodable:
        """A packed layer to be decoded, by the code of its format."""
        return self._read(layer, self._store_of(layer).decodable)

    def _read(self, layer: str, made: Callable[[Mapping[str, torch.Tensor], Scheme], W]) -> W:
        tensors = {suffix: self._reader.read(name) for suffix, name in self._names[layer].items()}
        with self._unpacking(layer):
            found = made(tensors, self.schemes[layer])
            if isinstance(found, QuantizedWeight):
                found.check()
            return found

    @contextmanager
    def _unpacking(self, layer: str) -> Iterator[None]:
        """Turn what comes of tensors that do not fit each other into one line."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(f"layer {layer} of {self.path}: {error.problem}", error.remedy) from error
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:
            what = str(error).partition("\n")[0]
            raise CheckpointError(
                f"layer {layer} of {self.path} cannot be unpacked: {type(error).__name__}: {what}",
                "its tensors do not fit each other: get the checkpoint again",
            ) from error

    def input_rounding(self, layer: str) -> InputRounding | None:
        """As its format says."""
        return self._store.input_rounding(self.schemes[layer])

    def input_scale(self, layer: str) -> torch.Tensor | None:
        """By the code of its format, without reading its codes."""
        store, names = self._store_of(layer), self._names[layer]
        with self._unpacking(layer):
            return store.input_scale(lambda suffix: self._reader.read(names[suffix]), self.schemes[layer])

    def float_names(self) -> list[str]:
        """All tensors but those of packed layers and the scales of activations."""
        packed = {name for names in self._names.values() for name in names.values()}
        left_out = packed | {*self.activation_scales(), *self.cache_scales()}
        return [name for name in self._reader.names() if name not in left_out]

    def cache_scales(self) -> list[str]:
        """Those of names that end so, where the config asks for it."""
        return [name for name in self._reader.names() if self.cache is not None and name.endswith(CACHE_SCALES)]

    def activation_scales(self) -> list[str]:
        """Names of the tensors by which runtimes of another tool's file round activations and KV caches."""
        return [name for name in self._reader.names() if self._foreign and name.endswith(SCALES_OF_ACTIVATIONS)]

    def remarks(self) -> tuple[str, ...]:
        """What someone who loads the checkpoint should know, as its format says."""
        linear = {scheme for layer, scheme in self.schemes.items() if layer != self.embedding}
        found = self._store.remarks(linear)
        if self.embedding is not None:
            found += self._store.for_embeddings().remarks({self.schemes[self.embedding]})
        return tuple(dict.fromkeys(found))

    def float_shape(self, name: str) -> tuple[int, ...]:
        """From the file's header."""
        return self._reader.shape(name)

    def float_dtype(self, name: str) -> torch.dtype:
        """From the file's header."""
        return self._reader.dtype(name)

    def float_tensor(self, name: str) -> torch.Tensor:
        """As it lies on disk."""
        return self._reader.read(name)

    def shape(self, layer: str) -> tuple[int, int]:
        """By the code of its format, from the shapes of the packed tensors where it can tell."""
        store, names = self._store_of(layer), self._names[layer]
        shapes = {suffix: self._reader.shape(name) for suffix, name in names.items()}
        with self._unpacking(layer):
            told = store.layer_shape(shapes, lambda suffix: self._reader.read(names[suffix]), self.schemes[layer])
        rows, columns = told or self.weight(layer).codes.shape
        return rows, columns

    def layer_bytes(self, layer: str) -> int:
        """From the file's header."""
        return sum(self._reader.nbytes(name) for name in self._names[layer].values())

    def files(self) -> list[Path]:
        """The index and the shards."""
        return self._reader.files()

    def _store_of(self, layer: str) -> Format:
        return self._store.for_embeddings() if layer == self.embedding else self._store

    def _packed_names(self, layer: str, scheme: Scheme) -> dict[str, str]:
        store = self._store_of(layer)
        names = {suffix: f"{layer}.{suffix}" for suffix in store.layer_suffixes(scheme)}
        missing = {suffix for suffix in store.optional_suffixes if names.get(suffix) not in self._reader}
        for suffix in names.keys() - missing:
            self._reader.shape(names[suffix])  # raises for a tensor that is not there
        return {suffix: name for suffix, name in names.items() if suffix not in missing}


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``.

    Raises:
        CheckpointError: there is none, or it is no mapping.
    """
    adapter = adapter_in(folder)
    if adapter is not None:
        raise CheckpointError(*adapter)
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint: its config.json cannot be read", "check the path"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} is not a mapping", "get the model from its source")
    check_sizes(config, str(folder / "config.json"), folder)
    return config


def _read_foreign(
    folder: Path, config: Mapping[str, Any], reader: CheckpointReader
) -> tuple[Format, Mapping[str, Scheme]]:
    """Format and schemes of a checkpoint that another tool wrote."""
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{folder} is not quantized: its config.json has no quantization_config", "check the path"
        )
    try:
        for store in FORMATS:
            if store.reads(found):
                return store.for_config(found, _dtype(config)), store.schemes_in(found, reader)
    except (AttributeError, TypeError, LookupError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"the quantization_config of {folder} cannot be read: {type(error).__name__}: {str(error)[:200]}",
            "its keys are not what its format has there: get the checkpoint again from its source",
        ) from error
    method = found.get("quant_method", "none")
    raise CheckpointError(
        f"{folder} is quantized with '{method}', which quantkit does not read",
        f"it reads {', '.join(FORMATS.names())}",
    )


def _dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def _author(folder: Path, config: Mapping[str, Any], store: Format) -> str:
    """Who wrote a checkpoint, as far as its config says."""
    meta = config["quantization_config"].get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    if quantizer:
        return " ".join(map(str, quantizer)) if isinstance(quantizer, list) else str(quantizer).replace(":", " ")
    return store.author(config, folder) or "unknown"
