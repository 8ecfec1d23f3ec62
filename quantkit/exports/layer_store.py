"""Layers on their way to a checkpoint: packed and on disk, so that memory holds few of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from quantkit.checkpoint import CheckpointReader, ShardWriter
from quantkit.errors import CheckpointError
from quantkit.exports.content import Stored, digest, same_values
from quantkit.formats.base import Format
from quantkit.schemes import QuantizedWeight
from quantkit.schemes.rounding import CACHE_SCALES, CacheRounding


class LayerStore:
    """Packs layers and keeps them on disk in checkpoints of their own.

    Args:
        folder: where these checkpoints go.
        store: the format that packs them.
        embedding: full name of the input embedding if it is quantized.
    """

    def __init__(self, folder: Path, store: Format, embedding: str | None = None) -> None:
        self._folder = folder
        self._store = store
        self._embedding = embedding
        self._waiting: dict[str, torch.Tensor] = {}
        self._weighed: dict[str, list[str]] = {}
        self._readers: dict[str, CheckpointReader] = {}
        self._digests: dict[str, str] = {}
        self._replaced: set[str] = set()
        self._tensors: dict[str, list[str]] = {}
        self.stored_bytes = 0

    def keep(self, layer: str, weight: QuantizedWeight) -> QuantizedWeight:
        """Pack a layer on the device of its weight; what the format can hold of it is returned.

        Raises:
            CheckpointError: what was packed does not decode to that.
        """
        store = self._store_of(layer)
        weight = store.fitted(weight)
        packed = {suffix: tensor.contiguous() for suffix, tensor in store.pack(weight).items()}
        if not gives_back(store, packed, weight):
            raise CheckpointError(
                f"layer {layer} in {self._folder} does not decode to what the method returned",
                f"format {store.name} does not give back what it packed: report it, and use another",
            )
        self._weighed[layer] = [f"{layer}.{suffix}" for suffix in store.layer_suffixes(weight.scheme)]
        named = {f"{layer}.{suffix}": tensor.cpu() for suffix, tensor in packed.items()}
        self._tensors[layer] = list(named)
        self._waiting.update(named)
        weights = (tensor for name, tensor in named.items() if not name.endswith(store.beside))
        self.stored_bytes += sum(tensor.nbytes for tensor in weights)
        return weight

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a float tensor that stands in for the source's."""
        self._replaced.add(name)
        self._waiting[name] = tensor

    def flush(self, name: str) -> None:
        """Write what waits, as a checkpoint called ``name``.

        Raises:
            OutputError: the folder cannot be written, the disk is full.
        """
        if not self._waiting:
            return
        folder = self._folder / name
        self._digests |= write_layers(folder, self._waiting, self._weighed)
        self._readers.update(dict.fromkeys(self._waiting, CheckpointReader(folder)))
        self._waiting, self._weighed = {}, {}

    def _store_of(self, layer: str) -> Format:
        return self._store.for_embeddings() if layer == self._embedding else self._store

    def packed(self, layer: str) -> dict[str, Stored]:
        """The packed tensors of a layer by suffix; none if it was not kept."""
        names = self._tensors.get(layer, [])
        return {name.removeprefix(f"{layer}."): self.stored(name) for name in names}

    def replaces(self, name: str) -> bool:
        """Whether a float tensor of the source is replaced by one of the layer store."""
        return name in self._replaced

    def cache_scales(self) -> list[str]:
        """Names of the scales of keys and values that it was given."""
        return sorted(name for name in self._replaced if name.endswith(CACHE_SCALES))

    def takes_cache(self, rounding: CacheRounding | None) -> bool:
        """Whether the format can say that runtimes store keys and values so."""
        return rounding is not None and rounding.name in self._store.caches

    def stored(self, name: str) -> Stored:
        """A tensor of the layer store."""
        return Stored.of(self._readers[name], name)

    def digests(self) -> Mapping[str, str]:
        """Layer name to the digest of its packed tensors, see :func:`quantkit.exports.content.digest`."""
        return self._digests


def gives_back(store: Format, packed: Mapping[str, torch.Tensor], weight: QuantizedWeight) -> bool:
    """Whether a format decodes what it packed to the weight that this was.

    It is asked on the device of the weight first, so that from a GPU only packed bytes come to the CPU. A format may
    be made for the CPU alone, and there may be no room; a no is asked for once more where files are decoded.
    """
    device = weight.codes.device
    if device.type != "cpu":
        there = {suffix: tensor.to(device) for suffix, tensor in packed.items()}
        with suppress(RuntimeError, TypeError), torch.device(device):
            if same_values(store.unpack(there, weight.scheme), weight):
                return True
    here = {suffix: tensor.cpu() for suffix, tensor in packed.items()}
    return same_values(store.unpack(here, weight.scheme), weight.to("cpu"))


def write_layers(
    folder: Path, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Write tensors as a checkpoint.

    Args:
        folder: of the checkpoint.
        tensors: by name, on the CPU.
        layers: the names of the tensors that are a layer's weight, by layer.

    Returns:
        By layer the digest of these tensors.

    Raises:
        OutputError: the folder cannot be written, the disk is full.
    """
    with ShardWriter(folder) as writer:
        for name, tensor in tensors.items():
            writer.declare(name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return {layer: digest(tensors[name] for name in names) for layer, names in layers.items()}
