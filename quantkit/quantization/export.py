"""From solved layers to a checkpoint that a runtime loads, read back and compared before it counts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.artifacts import STAGE_FILE, file_sha256, read_json, translated_os_errors, write_json
from quantkit.checkpoint import CheckpointReader, ShardWriter
from quantkit.errors import CheckpointError
from quantkit.formats.base import Format
from quantkit.quantization.spool import Spool, digest, unpacked
from quantkit.schemes import IntScheme

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


def write_checkpoint(
    origin: Origin, spool: Spool, store: Format, layers: Mapping[str, IntScheme | None], folder: Path
) -> None:
    """Write the checkpoint of a variant and compare it with what was solved.

    Tensors of the source that were not quantized are copied as they are.

    Raises:
        OutputError: the folder cannot be written.
        CheckpointError: what was read back is not what was written.
    """
    reader = CheckpointReader(origin.folder)
    quantized = {f"{name}.weight" for name, scheme in layers.items() if scheme is not None}
    kept = [name for name in reader.names() if name not in quantized]
    _copy_companions(origin, folder)
    with ShardWriter(folder) as writer:
        for name in kept:
            writer.declare(name, reader.dtype(name), reader.shape(name))
        for name, tensor in _packed(spool):
            writer.declare(name, tensor.dtype, tuple(tensor.shape))
        for name in kept:
            writer.write(name, reader.read_finite(name))
        for name, tensor in _packed(spool):
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


def _packed(spool: Spool) -> Iterator[tuple[str, torch.Tensor]]:
    for name in spool.names():
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


def _write_config(origin: Origin, store: Format, layers: Mapping[str, IntScheme | None], folder: Path) -> None:
    config = read_json(origin.folder / "config.json")
    config["quantization_config"] = store.quantization_config(layers)
    if origin.head is not None and layers[origin.head] is not None:
        config["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)


def _compare(
    reader: CheckpointReader,
    kept: list[str],
    spool: Spool,
    store: Format,
    layers: Mapping[str, IntScheme | None],
    folder: Path,
) -> None:
    written = CheckpointReader(folder)
    remedy = "the disk or its memory is faulty, or another process writes here: quantize again"
    for name in kept:
        if not torch.equal(reader.read(name), written.read(name)):
            raise CheckpointError(f"tensor {name} in {folder} differs from the source after writing", remedy)
    for layer, wanted in spool.digests().items():
        scheme = layers[layer]
        if scheme is None or digest(unpacked(store, layer, scheme, written.read)) != wanted:
            raise CheckpointError(f"layer {layer} in {folder} does not decode to what the method returned", remedy)
