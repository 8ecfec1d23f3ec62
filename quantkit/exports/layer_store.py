"""Layers on their way to a checkpoint: packed and on disk, so that memory holds few of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from quantkit.checkpoint import CheckpointReader, ShardWriter
from quantkit.exports.content import Stored, digest
from quantkit.formats.base import Format
from quantkit.schemes import QuantizedWeight


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
        self._readers: dict[str, CheckpointReader] = {}
        self._digests: dict[str, str] = {}
        self._replaced: set[str] = set()
        self._tensors: dict[str, list[str]] = {}
        self.stored_bytes = 0

    def keep(self, layer: str, weight: QuantizedWeight) -> QuantizedWeight:
        """Pack a layer; what the format can hold of it is returned."""
        store = self._store_of(layer)
        weight = store.fitted(weight.to("cpu"))
        self._digests[layer] = digest(weight)
        packed = {f"{layer}.{suffix}": tensor for suffix, tensor in store.pack(weight).items()}
        self._tensors[layer] = list(packed)
        self._waiting.update(packed)
        weights = (tensor for name, tensor in packed.items() if not name.endswith(store.beside))
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
        self._write(folder)
        self._readers.update(dict.fromkeys(self._waiting, CheckpointReader(folder)))
        self._waiting = {}

    def _store_of(self, layer: str) -> Format:
        return self._store.for_embeddings() if layer == self._embedding else self._store

    def _write(self, folder: Path) -> None:
        """What waits, as a checkpoint."""
        with ShardWriter(folder) as writer:
            for each, tensor in self._waiting.items():
                writer.declare(each, tensor.dtype, tuple(tensor.shape))
            for each, tensor in self._waiting.items():
                writer.write(each, tensor)

    def packed(self, layer: str) -> dict[str, Stored]:
        """The packed tensors of a layer by suffix; none if it was not kept."""
        names = self._tensors.get(layer, [])
        return {name.removeprefix(f"{layer}."): self.stored(name) for name in names}

    def replaces(self, name: str) -> bool:
        """Whether a float tensor of the source is replaced by one of the layer store."""
        return name in self._replaced

    def stored(self, name: str) -> Stored:
        """A tensor of the layer store."""
        return Stored.of(self._readers[name], name)

    def digests(self) -> Mapping[str, str]:
        """Layer name to the digest of what was kept of it, see :func:`quantkit.exports.content.digest`."""
        return self._digests
