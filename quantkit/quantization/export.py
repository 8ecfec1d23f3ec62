"""From solved layers to a checkpoint that a runtime loads, read back and compared before it counts."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.artifacts import STAGE_FILE, file_sha256, read_json, translated_os_errors, write_json
from quantkit.checkpoint import CheckpointReader, ShardWriter
from quantkit.errors import CheckpointError
from quantkit.formats.base import Format
from quantkit.quantization.plan import Layers
from quantkit.quantization.spool import Spool, digest, unpacked

COMPANIONS = (
    "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "merges.txt", "vocab.*", "*.tiktoken",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What goes along with the weights: tokenizer, chat templates, generation config, licence."""
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Origin:
    """The float checkpoint that a variant is made of.

    Attributes:
        folder: where it lies.
        head: full name of the model's output head, where that is a Linear layer.
        runs_code: it comes with Python code, which goes along.
    """

    folder: Path
    head: str | None
    runs_code: bool = False


def write_checkpoint(origin: Origin, spool: Spool, store: Format, layers: Layers, folder: Path) -> None:
    """Write the checkpoint of a variant and compare it with what was solved.

    Tensors of the source that were not quantized are copied as they are, but for those that the variant replaces.
    A weight that the head and the embedding shared is written for each of them once one is quantized.

    Raises:
        OutputError: the folder cannot be written.
        CheckpointError: what was read back is not what was written.
    """
    reader = CheckpointReader(origin.folder)
    kept = layers.kept(reader.names())
    _copy_companions(origin, folder)
    with ShardWriter(folder) as writer:
        for name, source in kept.items():
            writer.declare(name, reader.dtype(source), reader.shape(source))
        for name, tensor in _packed(spool, layers.quantized):
            writer.declare(name, tensor.dtype, tuple(tensor.shape))
        for name, source in kept.items():
            writer.write(name, spool.read(name) if spool.replaces(name) else reader.read_finite(source))
        for name, tensor in _packed(spool, layers.quantized):
            writer.write(name, tensor)
    _write_config(origin, store, layers, folder)
    _compare(reader, kept, spool, store, layers, folder)


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: the facts, and the SHA-256 and size of every other file of the folder."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    write_json(folder / MANIFEST, {**facts, "files": files})


def is_whole(folder: Path) -> bool:
    """Whether every file of the manifest is there with its size; contents are not hashed."""
    try:
        files = read_json(folder / MANIFEST)["files"]
        return all((folder / name).stat().st_size == facts["bytes"] for name, facts in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _packed(spool: Spool, layers: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The packed tensors in the order of the model's layers, in whatever order these were solved."""
    for layer in layers:
        for name in spool.names(layer):
            yield name, spool.read(name)


def _copy_companions(origin: Origin, folder: Path) -> None:
    left_out = {"config.json", STAGE_FILE, MANIFEST}
    patterns = (*COMPANIONS, "*.py") if origin.runs_code else COMPANIONS
    for path in sorted({path for pattern in patterns for path in origin.folder.glob(pattern)}):
        if path.is_file() and path.name not in left_out and not path.name.endswith(".index.json"):
            target = folder / path.relative_to(origin.folder)
            with translated_os_errors(target):
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def _write_config(origin: Origin, store: Format, layers: Layers, folder: Path) -> None:
    config = read_json(origin.folder / "config.json")
    quantization = store.quantization_config(layers.linears)
    if layers.embedding is not None:
        quantization = store.with_embedding(quantization, layers.embedding, layers.quantized[layers.embedding])
    config["quantization_config"] = quantization
    if layers.unties or origin.head in layers.quantized:
        config["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)


def _compare(
    reader: CheckpointReader,
    kept: Mapping[str, str],
    spool: Spool,
    store: Format,
    layers: Layers,
    folder: Path,
) -> None:
    written = CheckpointReader(folder)
    remedy = "the disk or its memory is faulty, or another process writes here: quantize again"
    for name, source in kept.items():
        wanted = spool.read(name) if spool.replaces(name) else reader.read(source)
        if not torch.equal(wanted, written.read(name)):
            raise CheckpointError(f"tensor {name} in {folder} differs from the source after writing", remedy)
    for layer, solved in spool.digests().items():
        packing = store.for_embeddings() if layer == layers.embedding else store
        if digest(unpacked(packing, layer, layers.quantized[layer], written.read)) != solved:
            raise CheckpointError(f"layer {layer} in {folder} does not decode to what the method returned", remedy)
