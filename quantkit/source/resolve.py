"""Which kind of reference a model's source is, and the float checkpoint that it leads to."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import FLOATS, CheckpointReader, ShardWriter
from quantkit.errors import CheckpointError, SourceError
from quantkit.exports import find_gguf
from quantkit.gguf.architecture import architecture_of
from quantkit.gguf.config import generation_config, model_config
from quantkit.gguf.head import GGUFHead, read_head
from quantkit.gguf.names import places_of
from quantkit.gguf.tensors import is_quantized, natural_dtype
from quantkit.gguf.tokenizer_reader import write_tokenizer
from quantkit.recipe import ModelSpec
from quantkit.recipe.model import HUB_REFERENCE
from quantkit.source import hub, package
from quantkit.source.float_names import float_name
from quantkit.source.folder import FloatFolder
from quantkit.source.halving import WIDE, halved
from quantkit.source.model import DECODED_FROM, DEQUANTIZED, SourceModel
from quantkit.system.artifacts import file_sha256, new_folder, read_stage, write_json, write_stage

STAGE = "source"
KEEPING = ("auto", "own")
"""Wishes for a dtype that leave it to the model."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def resolve(spec: ModelSpec, work: Path) -> SourceModel:
    """The float checkpoint that a recipe's model means.

    A folder or hub model whose dtype is the wanted one is used where it lies; a GGUF file is dequantized, another
    quantized checkpoint decoded, and another dtype converted, to ``work/source``, once for the same content. A model of
    wider floats than 16 bits is converted to 16 unless the recipe keeps it, see :func:`quantkit.source.halving.halved`.

    Raises:
        SourceError: the reference leads to no float model, with the remedy.
        CheckpointError: the model's safetensors are broken.
        OutputError: ``work`` or the hub's cache cannot be written.
    """
    reference = spec.source
    path = package.locate(reference) if reference.startswith(package.PREFIX) else Path(reference).expanduser()
    if not path.exists() and HUB_REFERENCE.fullmatch(reference) and path.suffix != ".gguf":
        original = float_name(reference)
        if original and not spec.decode:
            raise SourceError(
                f"{reference} is a 4-bit copy of a float model, made for QLoRA",
                f"give its float original, {original}, or set model.decode: true to decode the copy",
            )
        snapshot = hub.download(reference, spec.revision, trust_remote_code=spec.trust_remote_code)
        return _from_folder(snapshot.folder, spec, work, snapshot)
    if not path.exists():
        raise SourceError(f"there is no file or folder {path}", _near(path))
    if spec.revision:
        raise SourceError(f"model.revision '{spec.revision}' has no meaning for {path}", "remove it")
    file = find_gguf(path) if path.is_dir() else None
    if file is not None:
        return _from_gguf(file, spec, work)
    if path.is_dir():
        return _from_folder(path, spec, work, None)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise SourceError(
            f"{path} holds pickled weights, which can run code when they are read",
            "convert them to safetensors: load the model where you trust it and call save_pretrained",
        )
    if path.suffix.lower() != ".gguf":
        raise SourceError(f"{path} is not a GGUF file", "give a .gguf file, or the folder that holds config.json")
    return _from_gguf(path, spec, work)


def _from_folder(folder: Path, spec: ModelSpec, work: Path, snapshot: hub.Snapshot | None) -> SourceModel:
    model = FloatFolder(folder, trust_remote_code=spec.trust_remote_code, decode=spec.decode)
    sha256, decoding = model.sha256(snapshot.sha256 if snapshot else {}), model.decoding
    found = SourceModel(
        folder=work / STAGE,
        reference=spec.source,
        kind="hub" if snapshot else "folder",
        relative_to="the float model" if decoding is None and not model.config.get(DECODED_FROM) else DEQUANTIZED,
        dtype=model.dtype if spec.dtype in KEEPING else spec.dtype,
        sha256=sha256,
        revision=snapshot.revision if snapshot else None,
        unchecked=snapshot.unchecked if snapshot else (),
        decoded=decoding.form if decoding else None,
        notes=tuple(model.notes),
        mended=tuple(model.mended),
    )
    if spec.dtype == "auto" and model.dtype in WIDE:
        found = _halved(found, model.values)
    if found.dtype not in FLOATS:
        raise SourceError(f"{folder} holds {found.dtype} weights", f"set model.dtype to one of {', '.join(FLOATS)}")
    if model.lies_as(found.dtype):
        return replace(found, folder=folder)
    if not _is_done(found.folder, found.made_from()):
        with new_folder(found.folder) as new:
            lost = model.copy_as(found.dtype, new)
            write_stage(new, STAGE, found.made_from(), reference=spec.source, note=found.note, lost=lost)
    lost = (read_stage(found.folder, STAGE, found.made_from()) or {}).get("lost")
    return replace(found, notes=(*found.notes, lost)) if lost else found


def _halved(found: SourceModel, values: Callable[[], Iterable[torch.Tensor]]) -> SourceModel:
    """The model in 16 bits: as it lies there from an earlier run, or as its values ask for."""
    for dtype in ("bfloat16", "float16"):
        before = replace(found, dtype=dtype)
        facts = read_stage(found.folder, STAGE, before.made_from())
        if facts is not None and facts.get("note"):
            return replace(before, note=facts["note"])
    chosen = halved(values())
    return replace(found, dtype=chosen.dtype, note=chosen.note(found.reference, found.dtype))


def _from_gguf(path: Path, spec: ModelSpec, work: Path) -> SourceModel:
    head = read_head(path)
    dtype = natural_dtype(head) if spec.dtype in KEEPING else FLOATS[spec.dtype]
    source = SourceModel(
        folder=work / STAGE,
        reference=spec.source,
        kind="gguf",
        relative_to=DEQUANTIZED if is_quantized(head) else "the float model",
        dtype=str(dtype).removeprefix("torch."),
        sha256={file.name: file_sha256(file) for file in head.files},
    )
    if spec.dtype == "auto" and source.dtype in WIDE:
        source = _halved(source, partial(_values, head))
    if not _is_done(source.folder, source.made_from()):
        with new_folder(source.folder) as new:
            _write_converted(head, new, FLOATS[source.dtype])
            write_stage(new, STAGE, source.made_from(), reference=spec.source, note=source.note)
    return source


def _values(head: GGUFHead) -> Iterator[torch.Tensor]:
    """The tensors of a GGUF file's model, as they are there."""
    places = places_of(head, model_config(head, torch.float32), architecture_of(head))
    yield from (place.read(head, torch.float32) for place in places.values())


def _write_converted(head: GGUFHead, folder: Path, dtype: torch.dtype) -> None:
    """Write the model of a GGUF file with its config, tokenizer and chat template."""
    config = model_config(head, dtype)
    places = places_of(head, config, architecture_of(head))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(head))
    write_tokenizer(head, folder)
    with ShardWriter(folder) as writer:
        for name, place in places.items():
            writer.declare(name, dtype, place.shape(head))
        for name, place in places.items():
            writer.write(name, place.read(head, dtype))


def _is_done(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether the stage stands there whole; one that was damaged since is made again."""
    if read_stage(folder, STAGE, made_from) is None:
        return False
    try:
        CheckpointReader(folder)
    except CheckpointError:
        return False
    return True


def _near(path: Path) -> str:
    """A remedy for a path that is not there: the nearest name beside it."""
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{path.parent / near[0]}'? " if near else ""
    return f"{hint}give a folder, a .gguf file, org/name of a hub model, or {package.PREFIX}NAME/path/inside"
