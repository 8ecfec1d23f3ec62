"""From solved layers to what a checkpoint is made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint import CheckpointReader
from quantkit.exports.content import Content, Stored
from quantkit.quantization.job import DTYPES
from quantkit.quantization.plan import Layers
from quantkit.quantization.solved_layers import SolvedLayers


@dataclass(frozen=True, slots=True)
class Origin:
    """The float checkpoint that a variant is made of.

    Attributes:
        folder: where it lies.
        dtype: of its weights.
        head: full name of the model's output head, where that is a Linear layer.
        runs_code: it comes with Python code, which goes along.
    """

    folder: Path
    dtype: str
    head: str | None
    runs_code: bool = False


def content_of(origin: Origin, spool: SolvedLayers, layers: Layers) -> Content:
    """What the checkpoint of a variant is made of.

    Tensors of the source that were not quantized are taken as they are, but for those that the variant replaces.
    A weight that the head and the embedding shared is there for each of them once one is quantized.
    """
    reader = CheckpointReader(origin.folder)
    kept = layers.kept(reader.names())
    floats = {
        name: spool.stored(name) if spool.replaces(name) else Stored.of(reader, source, finite=True)
        for name, source in kept.items()
    }
    changes: dict[str, Any] = {}
    if layers.unties or origin.head in layers.quantized:
        changes["tie_word_embeddings"] = False
    if layers.cast is not None:
        changes["dtype"] = layers.cast
        floats = {name: tensor.cast(DTYPES[layers.cast], name) for name, tensor in floats.items()}
    return Content(
        origin=origin.folder,
        dtype=layers.cast or origin.dtype,
        linears=layers.linears,
        packed={layer: spool.packed(layer) for layer in layers.quantized},
        floats=floats,
        digests=spool.digests(),
        embedding=None if layers.embedding is None else (layers.embedding, layers.quantized[layers.embedding]),
        changes=changes,
        runs_code=origin.runs_code,
    )
