"""Guests: files that people put into a folder of ours. They are taken along when the folder is written anew."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

OURS = "files"
"""The key of ``stage.json`` under which a folder that people may put files into lists its own."""
WRITTEN_LATER = ("README.md", "verified.json", "manifest.json.minisig")
"""What quantkit itself adds to a finished folder: the card, verdicts of runtimes, a signature."""


def own_files(folder: Path) -> list[str]:
    """The places of all files of a folder, as it is before anybody else has put something there."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())


def take_along(old: Path, new: Path, stage_file: str) -> None:
    """Move the guests of an old folder to the same places in the new one; what is done already is not done again.

    One whose place is taken there gets ``.kept`` behind its name. A folder that lists no files of its own has none.

    Args:
        old: the folder that is about to go.
        new: what stands in its place.
        stage_file: name of the file in which it says what is its own.
    """
    try:
        listed = json.loads((old / stage_file).read_text(encoding="utf-8"))[OURS]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for file in list(_guests(old, {*listed, *WRITTEN_LATER, stage_file})):
        target = new / file.relative_to(old)
        while os.path.lexists(target) or target.parent.is_file():
            target = new / f"{target.relative_to(new).as_posix()}.kept"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(file, target)


def _guests(folder: Path, ours: set[str]) -> Iterator[Path]:
    """The files, links and empty folders that are not ours."""
    for path in sorted(folder.rglob("*")):
        is_folder = path.is_dir() and not path.is_symlink()
        if path.relative_to(folder).as_posix() in ours or (is_folder and any(path.iterdir())):
            continue
        yield path
