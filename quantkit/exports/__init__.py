"""Quantized checkpoints on disk, whoever wrote them: read layer by layer, and written."""

from __future__ import annotations

from pathlib import Path

from quantkit.errors import CheckpointError
from quantkit.exports.base import Export
from quantkit.gguf.parts import parts_of, whole_files

__all__ = ["IMATRIX", "Export", "find_gguf", "open_export"]

IMATRIX = "imatrix.gguf"
"""The importance matrix beside a GGUF file."""


def open_export(path: Path) -> Export:
    """A quantized checkpoint: a folder of safetensors, a ``.gguf`` file, or a folder that holds one.

    Raises:
        CheckpointError: there is none, it is not quantized, of a format that quantkit does not read, or broken.
        SchemeError: it names a scheme that quantkit does not have.
    """
    from quantkit.exports.folder import FolderExport

    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}", "check the path")
    file = find_gguf(path)
    if file is None:
        return FolderExport(path)
    from quantkit.exports.gguf import GgufExport

    return GgufExport(file)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a checkpoint is, of one in parts the first; None where it is a folder with ``config.json``.

    Raises:
        CheckpointError: a folder holds several and no other checkpoint.
    """
    if path.is_file():
        first = parts_of(path)[0]
        return first if first.exists() else path
    if (path / "config.json").exists():
        return None
    files = whole_files(file for file in path.glob("*.gguf") if file.name != IMATRIX)
    if len(files) > 1:
        raise CheckpointError(f"{path} holds {len(files)} GGUF files", f"name one of them, such as {files[0]}")
    return files[0] if files else None
