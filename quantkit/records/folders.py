"""Folders that hold one data set: as ``datasets`` saves it (``save_to_disk``), or as the parts of one table."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError

SPLIT = "train"
STATE = "state.json"
SPLITS = "dataset_dict.json"
ABOUT = ("dataset_info.json", "dataset_infos.json", STATE, SPLITS)
"""Files about a data set that hold none of it."""
USUAL_FOLDER = "data"
_PROSE = re.compile(r"readme|licen[cs]e|notice|changelog|citation|\.", re.IGNORECASE)
"""How names of files begin that are about a data set."""
_NUMBER = re.compile(r"\d+")
_SHOWN = 6


def files_of(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files of the data set in a folder, in their order: of several splits those of ``train``.

    Args:
        folder: a split or several that ``datasets`` saved, or files whose names differ in numbers alone, there or in
            its folder ``data``.
        suffixes: of files of records.

    Raises:
        CalibrationError: it holds none or several.
    """
    splits = _listed(folder / SPLITS, "splits")
    if splits:
        if SPLIT not in splits and len(splits) > 1:
            raise CalibrationError(f"data set {folder} has the splits {', '.join(splits)}", "give the folder of one")
        return files_of(folder / (SPLIT if SPLIT in splits else str(splits[0])), suffixes)
    saved = _listed(folder / STATE, "_data_files")
    if saved:
        return [folder / Path(str(each["filename"])).name for each in saved]
    found = sorted(each for each in folder.iterdir() if _is_records(each, suffixes))
    if not found and (folder / USUAL_FOLDER).is_dir():
        return files_of(folder / USUAL_FOLDER, suffixes)
    parts = [each for each in found if re.match(rf"{SPLIT}\b", each.name)] or found
    if len({_NUMBER.sub("", each.name) for each in parts}) != 1:
        names = ", ".join(each.name for each in parts[:_SHOWN])
        what = f"holds several data sets: {names}" if parts else "holds no file of records"
        raise CalibrationError(f"data set {folder} is a folder that {what}", "give a file of it")
    return parts


def _is_records(file: Path, suffixes: Collection[str]) -> bool:
    kind = Path(file.stem).suffix if file.suffix.lower() == ".gz" else file.suffix
    return file.is_file() and file.name not in ABOUT and kind.lower() in suffixes and not _PROSE.match(file.name)


def _listed(file: Path, key: str) -> list[Any]:
    """A list in one of the files of ``datasets``; none where there is no such file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{file} cannot be read: {error}", "save the data set again") from error
    named = found.get(key) if isinstance(found, dict) else None
    return named if isinstance(named, list) else []
