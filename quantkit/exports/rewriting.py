"""An export as the base of another file: its model, what goes along, and the same file with other values."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from quantkit.checkpoint import FLOATS, CheckpointReader, ShardWriter
from quantkit.checkpoint.companions import copy_companions
from quantkit.checkpoint.tied import TIED, UNTIED, set_tied, tied_by_tensors
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import CheckpointError
from quantkit.exports.base import Export
from quantkit.exports.content import Content, Stored
from quantkit.exports.folder_writer import FAULTY
from quantkit.exports.layer_store import LayerStore
from quantkit.exports.manifest import model_name, read_manifest
from quantkit.formats.base import Format
from quantkit.schemes import Scheme
from quantkit.system.artifacts import STAGE_FILE, translated_os_errors, write_json


def origin_folder(export: Export, folder: Path) -> Path:
    """A folder with the float model's config, the tokenizer and what else goes along."""
    folder.mkdir()
    copy_companions(export.tokenizer_folder(), folder, code=True)
    write_json(folder / "config.json", export.config())
    return folder


def model_of(export: Export, origin: Path, trust_remote_code: bool) -> tuple[Skeleton, list[str]]:
    """The model whose layers an export holds, and what its config said of the head and its tensors do not."""
    stored = [*export.float_names(), *(f"{layer}.weight" for layer in export.schemes)]
    skeleton = Skeleton(origin, trust_remote_code, stored, export.schemes.keys())

    def parts(name: str) -> list[torch.Tensor]:
        layer = name.removesuffix(".weight")
        packed = layer in export.schemes
        return [export.decodable(layer).dequantize(torch.float32) if packed else export.float_tensor(name)]

    tied = tied_by_tensors(skeleton.model, skeleton.names, parts)
    if tied is None:
        return skeleton, []
    write_json(origin / "config.json", set_tied(export.config(), tied))
    return Skeleton(origin, trust_remote_code, stored, export.schemes.keys()), [TIED if tied else UNTIED]


def floats_that_stay(export: Export, skeleton: Skeleton, target: type[Format]) -> list[str]:
    """The float tensors that go along."""
    dropped = set(skeleton.left_out(all_unknown=target.container == "gguf"))
    return [name for name in export.float_names() if name not in dropped]


def content_of(
    export: Export,
    origin: Path,
    skeleton: Skeleton,
    schemes: Mapping[str, Scheme],
    layers: LayerStore,
    floats: Sequence[str],
    *,
    code: bool,
) -> Content:
    """What a checkpoint is made of that has an export's layers in another format, or other values of them.

    Args:
        export: the base.
        origin: see :func:`origin_folder`.
        skeleton: see :func:`model_of`.
        schemes: of the layers, as the new checkpoint stores them.
        layers: packed for it.
        floats: names of the float tensors that go along.
        code: the model comes with Python code, which goes along.
    """

    def plain(name: str) -> Stored:
        return Stored(export.float_dtype(name), export.float_shape(name), lambda: export.float_tensor(name))

    cache = export.cache if layers.takes_cache(export.cache) else None
    return Content(
        origin=origin,
        dtype=float_dtype(export),
        linears={layer.name: schemes.get(layer.name) for layer in skeleton.layers()},
        packed={layer: layers.packed(layer) for layer in schemes},
        floats={name: plain(name) for name in (*floats, *(export.cache_scales() if cache is not None else ()))},
        cache=cache,
        turns=export.turns,
        digests=layers.digests(),
        embedding=None if export.embedding is None else (export.embedding, schemes[export.embedding]),
        paths={layer.name: layer.path for layer in skeleton.layers() if layer.name != layer.path},
        others=skeleton.others(),
        name=model_name(str(export.path)),
        runs_code=code,
    )


def write_again(export: Export, folder: Path, changed: Mapping[str, torch.Tensor]) -> None:
    """Write a folder of safetensors anew, with other values for some of its tensors; all else is copied.

    Args:
        export: it; a folder that quantkit wrote.
        folder: an empty one.
        changed: tensors by their names in the files, of the dtypes and shapes that they have there.

    Raises:
        OutputError: the folder cannot be written.
        CheckpointError: what was read back is not what was written.
    """
    reader, listed = CheckpointReader(export.path), (read_manifest(export.path) or {}).get("files", {})
    tensors = {file.relative_to(export.path).as_posix() for file in reader.files()}
    with translated_os_errors(folder):
        for name in sorted(set(listed) - tensors - {STAGE_FILE}):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(export.path / name, folder / name)
    with ShardWriter(folder) as writer:
        for name in reader.names():
            writer.declare(name, reader.dtype(name), reader.shape(name))
        for name in reader.names():
            writer.write(name, changed.get(name, reader.read(name)))
    written = CheckpointReader(folder)
    for name in reader.names():
        if not torch.equal(written.read(name), changed.get(name, reader.read(name))):
            raise CheckpointError(f"tensor {name} in {folder} is not what was written", FAULTY)


def float_dtype(export: Export) -> str:
    """The dtype of the float model."""
    config = export.config()
    found = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return found if found in FLOATS else "float32"
