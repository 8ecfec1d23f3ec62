"""Keep the user's folders out of records: paths are written relative to where quantkit runs, or to the home folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def private(value: Any) -> Any:
    """JSON data with every absolute path in it shortened; what is no path stays as it is."""
    if isinstance(value, Mapping):
        return {key: private(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [private(item) for item in value]
    return place(value) if isinstance(value, str) and Path(value).is_absolute() else value


def place(path: str | Path) -> str:
    """A path relative to the working folder, else to ``~``, else its name alone after ``.../``; relative ones stay."""
    given = Path(path)
    if not given.is_absolute():
        return str(path)
    for root, mark in ((Path.cwd(), ""), (Path.home(), "~/")):
        if given.is_relative_to(root) and root != Path(root.anchor):
            return f"{mark}{given.relative_to(root).as_posix()}"
    return f".../{given.name}"


def without_folders(text: str) -> str:
    """A message without the working folder and the home folder in its paths."""
    for root, mark in ((Path.cwd(), ""), (Path.home(), "~/")):
        if root != Path(root.anchor):
            text = text.replace(f"{root}/", mark)
    return text
