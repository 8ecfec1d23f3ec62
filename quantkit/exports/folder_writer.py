"""Write a checkpoint as a folder of safetensors, and compare it with what it was made of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from quantkit.checkpoint import CheckpointReader, ShardWriter
from quantkit.checkpoint.companions import copy_companions
from quantkit.checkpoint.older_keys import add_older_tokenizer_keys, with_older_keys
from quantkit.checkpoint.tied import set_tied
from quantkit.errors import CheckpointError
from quantkit.exports.content import Content, Stored, digest
from quantkit.formats.base import Format
from quantkit.system.artifacts import read_json, write_json, write_text

FAULTY = "the disk or its memory is faulty, or another process writes here: quantize again"


def write_folder(content: Content, store: Format, folder: Path) -> None:
    """Write a checkpoint that transformers could read, and read it back.

    Raises:
        OutputError: the folder cannot be written.
        CheckpointError: what was read back is not what was written.
    """
    copy_companions(content.origin, folder, code=content.runs_code)
    add_older_tokenizer_keys(folder)
    with ShardWriter(folder) as writer:
        for name, tensor in _tensors(content):
            writer.declare(name, tensor.dtype, tensor.shape)
        for name, tensor in _tensors(content):
            writer.write(name, tensor.read())
    _write_config(content, store, folder)
    for name, text in store.extra_files(content.spelled).items():
        write_text(folder / name, text)
    _compare(content, store, folder)


def bytes_of_folder(content: Content) -> int:
    """Bytes of the files with tensors that :func:`write_folder` would write, told without reading a tensor."""
    writer = ShardWriter(content.origin)  # where nothing is written
    for name, tensor in _tensors(content):
        writer.declare(name, tensor.dtype, tensor.shape)
    return writer.nbytes()


def _tensors(content: Content) -> Iterator[tuple[str, Stored]]:
    """The float tensors, then the packed ones in the order of the model's layers."""
    yield from content.floats.items()
    for layer in content.schemes:
        for suffix, tensor in content.packed[layer].items():
            yield f"{layer}.{suffix}", tensor


def _write_config(content: Content, store: Format, folder: Path) -> None:
    config = read_json(content.origin / "config.json")
    config.pop("quantization_config", None)
    if not content.runs_code:
        config.pop("auto_map", None)  # it names Python files that do not go along
    if content.unties:
        config = set_tied(config, tied=False)
    if content.schemes:
        quantization = store.quantization_config(content.spelled)
        if content.embedding is not None:
            quantization = store.with_embedding(quantization, *content.embedding)
        if content.cache is not None:
            quantization = store.with_cache(quantization, content.cache)
        if content.turns:
            quantization = store.with_turns(quantization, content.spelled_turns)
        config["quantization_config"] = quantization
    if "dtype" in content.changes:
        config.pop("torch_dtype", None)
    write_json(folder / "config.json", with_older_keys({**config, **content.changes}))


def _compare(content: Content, store: Format, folder: Path) -> None:
    written = CheckpointReader(folder)
    for name, wanted in content.floats.items():
        if not torch.equal(wanted.read(), written.read(name)):
            raise CheckpointError(f"tensor {name} in {folder} differs from the source after writing", FAULTY)
    for layer, scheme in content.schemes.items():
        packing = store.for_embeddings() if content.embedding and layer == content.embedding[0] else store
        tensors = (written.read(f"{layer}.{suffix}") for suffix in packing.layer_suffixes(scheme))
        if digest(tensors) != content.digests[layer]:
            raise CheckpointError(f"layer {layer} in {folder} does not decode to what the method returned", FAULTY)
