"""The files that a tokenizer can be made of, and the packages without which some of them are not read."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

ONE_OF = ("tokenizer.json", "tekken.json", "vocab.json", "*.model", "*.tiktoken")
"""A model's folder has one of these at least."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's vocabulary."""
    return any(True for pattern in ONE_OF for _ in folder.glob(pattern))


def missing_package(folder: Path) -> tuple[str, str] | None:
    """A vocabulary that cannot be read here, and the package that would read it; None where nothing is missing.

    ``tokenizer.json`` and ``tekken.json`` need none; a ``.model`` is sentencepiece's, or tiktoken's lines of text.
    """
    if (folder / "tokenizer.json").exists() or (folder / "tekken.json").exists() or (folder / "vocab.json").exists():
        return None
    for file in sorted((*folder.glob("*.model"), *folder.glob("*.tiktoken"))):
        package = "tiktoken" if file.suffix == ".tiktoken" or _is_text(file) else "sentencepiece"
        if find_spec(package) is None:
            return file.name, package
    return None


def _is_text(file: Path) -> bool:
    """Whether a vocabulary is lines of a token in base64 and its rank, and no protocol buffer."""
    with file.open("rb") as stream:
        first = stream.read(200).split(b"\n")[0].split(b" ")
    return len(first) == 2 and first[1].strip().isdigit()
