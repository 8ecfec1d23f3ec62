"""The parts of a GGUF file that ``llama-gguf-split`` has split: ``NAME-00001-of-00003.gguf`` and so on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.gguf)", re.IGNORECASE)


def parts_of(path: Path) -> list[Path]:
    """All parts of the file of which ``path`` is one, by their names; ``path`` alone where its name says nothing."""
    found = _PART.fullmatch(path.name)
    if found is None or int(found["count"]) < 1:
        return [path]
    count = int(found["count"])
    names = (f"{found['name']}-{number:05d}-of-{count:05d}{found['end']}" for number in range(1, count + 1))
    return [path.with_name(name) for name in names]


def whole_files(paths: Iterable[Path]) -> list[Path]:
    """Files of a folder, those that are parts of one counted as one, by the first part that is there."""
    found: dict[Path, Path] = {}
    for path in sorted(paths):
        found.setdefault(parts_of(path)[0], path)
    return list(found.values())
