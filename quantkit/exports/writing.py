"""Write a checkpoint in the container that its format asks for."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

from quantkit.checkpoint import CheckpointReader
from quantkit.exports import find_gguf
from quantkit.exports.content import Content
from quantkit.exports.folder_writer import bytes_of_folder, write_folder
from quantkit.formats.base import Format


def check_origin(store: type[Format], folder: Path, names: Collection[str] | None = None) -> None:
    """Check before any work that a format's container can hold a model.

    Args:
        store: the format.
        folder: of the float model.
        names: of its tensors; by default those that lie in the folder.

    Raises:
        SourceError: with what it cannot say of the model.
    """
    if store.container == "gguf":
        from quantkit.exports.gguf_writer import check_source

        check_source(folder, names)


def origin_remarks(store: Format, folder: Path, dtype: str, names: Collection[str] | None = None) -> tuple[str, ...]:
    """What someone who loads a checkpoint should know because of the model that it was made of.

    Args:
        store: the format.
        folder: of the float model.
        dtype: of the float model.
        names: of its tensors; by default those that lie in the folder.
    """
    if store.container != "gguf":
        return ()
    from quantkit.exports.gguf_writer import source_remarks

    return source_remarks(folder, dtype, names)


def bits_of_file(folder: Path, origin: Path) -> float:
    """Bits that all tensors of a checkpoint take, for each parameter of the float model.

    Args:
        folder: of the checkpoint.
        origin: of the float model.

    Raises:
        CheckpointError: one of them is broken.
    """
    reader, file = CheckpointReader(origin), find_gguf(folder)
    parameters = sum(math.prod(reader.shape(name)) for name in reader.names())
    if file is None:
        written = CheckpointReader(folder)
        return sum(map(written.nbytes, written.names())) * 8 / parameters
    from quantkit.gguf.head import read_head

    return sum(tensor.nbytes for tensor in read_head(file).tensors.values()) * 8 / parameters


def write_export(content: Content, store: Format, folder: Path) -> None:
    """Write a checkpoint, read it back and compare.

    Raises:
        OutputError: the folder cannot be written.
        CheckpointError: what was read back is not what was written.
    """
    if store.container == "gguf":
        from quantkit.exports.gguf_writer import write_gguf

        write_gguf(content, folder)
    else:
        write_folder(content, store, folder)


def bytes_of_export(content: Content, store: Format) -> int:
    """Bytes of the files with tensors that :func:`write_export` would write, the index of several counted.

    Args:
        content: whose tensors are not read, and whose digests are not asked for.
        store: the format.
    """
    if store.container == "gguf":
        from quantkit.exports.gguf_writer import bytes_of_gguf

        return bytes_of_gguf(content)
    return bytes_of_folder(content)
