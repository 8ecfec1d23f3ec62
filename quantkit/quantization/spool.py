"""Solved layers on their way to a checkpoint: packed and on disk as soon as a segment is done."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import CheckpointReader, ShardWriter
from quantkit.engine.tasks import LayerResult
from quantkit.formats.base import Format
from quantkit.numerics.host import number
from quantkit.schemes import QuantizedWeight, Scheme


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is kept of a layer once its codes are on disk; the errors stay on the device until they are asked for."""

    name: str
    scheme: str
    tokens: int
    before: torch.Tensor
    after: torch.Tensor
    notes: tuple[str, ...]


class Spool:
    """Packs the layers of a variant and keeps them in a checkpoint of their own for each segment.

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
        self._facts: list[_Facts] = []
        self._replaced: set[str] = set()
        self._tensors: dict[str, list[str]] = {}
        self.stored_bytes = 0

    def take(self, result: LayerResult) -> None:
        """Pack a solved layer; see :class:`quantkit.engine.tasks.Sink`."""
        weight = result.weight.to("cpu")
        self._digests[result.name] = digest(weight)
        store = self._store.for_embeddings() if result.name == self._embedding else self._store
        packed = {f"{result.name}.{suffix}": tensor for suffix, tensor in store.pack(weight).items()}
        self._tensors[result.name] = list(packed)
        self._waiting.update(packed)
        self.stored_bytes += sum(tensor.nbytes for tensor in packed.values())
        scheme = weight.scheme.describe()
        self._facts.append(_Facts(result.name, scheme, result.tokens, result.error_before, result.error, result.notes))

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a float tensor that stands in for the source's; see :class:`quantkit.engine.tasks.Sink`."""
        self._replaced.add(name)
        self._waiting[name] = tensor

    def segment_done(self, prefix: str) -> None:
        """Write what was packed since the last segment.

        Raises:
            OutputError: the folder cannot be written, the disk is full.
        """
        if not self._waiting:
            return
        folder = self._folder / prefix
        with ShardWriter(folder) as writer:
            for name, tensor in self._waiting.items():
                writer.declare(name, tensor.dtype, tuple(tensor.shape))
            for name, tensor in self._waiting.items():
                writer.write(name, tensor)
        self._readers.update(dict.fromkeys(self._waiting, CheckpointReader(folder)))
        self._waiting = {}

    def names(self, layer: str) -> list[str]:
        """Names of the packed tensors of a layer; none if it was not solved."""
        return self._tensors.get(layer, [])

    def replaces(self, name: str) -> bool:
        """Whether a float tensor of the source is replaced by one of the spool."""
        return name in self._replaced

    def read(self, name: str) -> torch.Tensor:
        """A packed tensor."""
        return self._readers[name].read(name)

    def digests(self) -> Mapping[str, str]:
        """Layer name to the hash of what the method returned for it, see :func:`digest`."""
        return self._digests

    def layers(self) -> list[dict[str, Any]]:
        """Scheme, errors and notes of each layer, for the report; asks the device twice for each."""
        return [
            {
                "name": each.name,
                "scheme": each.scheme,
                "tokens": each.tokens,
                "error_before": number(each.before),
                "error_after": number(each.after),
                "notes": list(each.notes),
            }
            for each in self._facts
        ]


def digest(weight: QuantizedWeight) -> str:
    """SHA-256 over the codes of a weight and, in float32, its scales and zeros: all that its values follow from."""
    found = hashlib.sha256(weight.codes.contiguous().numpy().data)
    for each in (weight.scales, weight.zeros):
        found.update(each.to(torch.float32).contiguous().numpy().data)
    return found.hexdigest()


def unpacked(store: Format, layer: str, scheme: Scheme, read: Callable[[str], torch.Tensor]) -> QuantizedWeight:
    """A layer as it is read back from a checkpoint."""
    return store.unpack({suffix: read(f"{layer}.{suffix}") for suffix in store.layer_suffixes(scheme)}, scheme)
