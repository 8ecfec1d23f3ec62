"""Finished segments of a variant on disk: each a folder that is whole, with the hashes of its files, or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.system.artifacts import file_sha256, read_json, translated_os_errors, write_json

RECORD = "segment.json"
"""What is known of a segment: facts of its layers, and the SHA-256 of every other file of the folder."""


@dataclass(frozen=True, slots=True)
class SavedSegment:
    """A segment that is whole on disk.

    Attributes:
        folder: its files.
        record: what :func:`save_segment` was given and told.
    """

    folder: Path
    record: Mapping[str, Any]


def save_segment(folder: Path, write: Callable[[Path], Mapping[str, Any]], record: Mapping[str, Any]) -> SavedSegment:
    """Save a segment so that ``folder`` appears whole.

    Args:
        folder: of the segment.
        write: writes its tensors into a folder, and returns what is known of them then, as JSON.
        record: JSON that belongs to it.

    Raises:
        OutputError: the disk is full, the folder cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with translated_os_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        known = {**record, **write(partial)}
        files = {path.name: file_sha256(path) for path in sorted(partial.iterdir())}
        write_json(partial / RECORD, {**known, "files": files})
        os.rename(partial, folder)
    return SavedSegment(folder, known)


def read_segments(folder: Path, names: Sequence[str]) -> tuple[list[SavedSegment], str]:
    """The saved segments up to the first that is missing or damaged; what follows it is removed.

    Args:
        folder: holds a folder for each segment.
        names: of all segments, in the order in which they are solved.

    Returns:
        The segments, and what is wrong with the first that does not count; empty where it is just missing.
    """
    found: list[SavedSegment] = []
    reason = ""
    for name in names:
        if not (folder / name).exists():
            break
        reason = _damage(folder / name)
        if reason:
            break
        found.append(SavedSegment(folder / name, read_json(folder / name / RECORD)))
    kept = {segment.folder for segment in found}
    for left in [path for path in folder.iterdir() if path.is_dir() and path not in kept]:
        shutil.rmtree(left, ignore_errors=True)
    return found, reason


def _damage(folder: Path) -> str:
    """What is wrong with a saved segment; empty if it is whole."""
    try:
        files = read_json(folder / RECORD)["files"]
        wrong = next((name for name, sha256 in files.items() if file_sha256(folder / name) != sha256), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / RECORD} cannot be read"
    return "" if wrong is None else f"{folder / wrong} is not what was written"
