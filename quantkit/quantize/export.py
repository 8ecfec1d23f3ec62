"""From solved layers to a checkpoint that a runtime loads, read back and compared before it counts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from quantkit.artifacts import file_sha256, read_json, translated_os_errors, write_json
from quantkit.checkpoint import CheckpointReader, ShardWriter
from quantkit.errors import CheckpointError
from quantkit.formats.base import Format
from quantkit.quantize.spool import Spool, digest, unpacked
from quantkit.schemes import IntScheme

COMPANIONS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
"""What goes along with the weights: tokenizer, chat template, generation config, licence."""
MANIFEST = "manifest.json"


def write_checkpoint(
    source: Path, spool: Spool, store: Format, layers: Mapping[str, IntScheme | None], folder: Path
) -> None:
    """Write the checkpoint of a variant and compare it with what was solved.

    Tensors of the source that were not quantized are copied as they are.

    Raises:
        OutputError: the folder cannot be written.
        CheckpointError: what was read back is not what was written.
    """
    reader = CheckpointReader(source)
    quantized = {f"{name}.weight" for name, scheme in layers.items() if scheme is not None}
    kept = [name for name in reader.names() if name not in quantized]
    _copy_companions(source, folder)
    with ShardWriter(folder) as writer:
        for name in kept:
            writer.declare(name, reader.dtype(name), reader.shape(name))
        for name, tensor in _packed(spool):
            writer.declare(name, tensor.dtype, tuple(tensor.shape))
        for name in kept:
            writer.write(name, reader.read_finite(name))
        for name, tensor in _packed(spool):
            writer.write(name, tensor)
    _write_config(source, store, layers, folder)
    _compare(reader, kept, spool, store, layers, folder)


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: the facts, and the SHA-256 and size of every other file of the folder."""
    files = {
        path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {**facts, "files": files})


def _packed(spool: Spool) -> Iterator[tuple[str, torch.Tensor]]:
    for name in spool.names():
        yield name, spool.read(name)


def _copy_companions(source: Path, folder: Path) -> None:
    left_out = {"config.json", "stage.json", "model.safetensors.index.json", MANIFEST}
    for path in sorted({path for pattern in COMPANIONS for path in source.glob(pattern)}):
        if path.is_file() and path.name not in left_out and not path.name.endswith(".safetensors.index.json"):
            with translated_os_errors(folder / path.name):
                shutil.copyfile(path, folder / path.name)


def _write_config(source: Path, store: Format, layers: Mapping[str, IntScheme | None], folder: Path) -> None:
    config = read_json(source / "config.json")
    config["quantization_config"] = store.quantization_config(layers)
    if any(scheme is not None and _is_head(name) for name, scheme in layers.items()):
        config["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)


def _is_head(name: str) -> bool:
    return "." not in name


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
