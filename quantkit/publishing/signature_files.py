"""Whether the files of a checkpoint are those that its manifest lists, byte by byte."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from quantkit.errors import CheckpointError
from quantkit.exports.manifest import MANIFEST, NOT_LISTED
from quantkit.system.artifacts import STAGE_FILE, file_sha256, read_json
from quantkit.system.os_errors import is_file

GET_AGAIN = "get the checkpoint again from its source"
ALLOWED = {*NOT_LISTED, STAGE_FILE}


def check_files(folder: Path) -> int:
    """Check every file against the manifest: its size, its SHA-256, and that there is no other file.

    Returns:
        How many there are.

    Raises:
        CheckpointError: there is no manifest, or the first difference.
    """
    listed = _listed(folder)
    for name, facts in listed.items():
        _check_file(folder, name, facts)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    unlisted = sorted(name for name in there - listed.keys() - ALLOWED if PurePosixPath(name).name[0] != ".")
    if unlisted:
        raise CheckpointError(
            f"{folder} holds {unlisted[0]}, which its manifest does not list", "remove it, or export again"
        )
    return len(listed)


def _listed(folder: Path) -> dict[str, Any]:
    try:
        listed = read_json(folder / MANIFEST)["files"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{folder} has no manifest that lists its files", "give the folder of a checkpoint that quantkit exported"
        ) from error
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / MANIFEST} lists no files", GET_AGAIN)
    return listed


def _check_file(folder: Path, name: str, facts: Any) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder / MANIFEST} names {name!r}, which lies outside the checkpoint", GET_AGAIN)
    path = folder / name
    if not is_file(path):
        raise CheckpointError(f"{name} of {folder} is missing", GET_AGAIN)
    if not isinstance(facts, dict) or path.stat().st_size != facts.get("bytes"):
        raise CheckpointError(f"{name} of {folder} is not of the size that the manifest says", GET_AGAIN)
    if file_sha256(path) != facts.get("sha256"):
        raise CheckpointError(
            f"{name} of {folder} is not the file that the manifest describes: its hash differs", GET_AGAIN
        )
