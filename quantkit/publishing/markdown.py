"""Pieces of Markdown into which texts of others go as texts, whatever they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#!|&~$])")


def plain(text: object) -> str:
    """A text on one line, with every character that Markdown or HTML would take for markup escaped."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """A text as code within a line, also of a table."""
    flat = " ".join(str(text).split()).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", flat)), default=0))
    padding = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{ticks}{padding}{flat}{padding}{ticks}"


def fenced(text: str, language: str) -> str:
    """A text as a block of code that nothing in it can end."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def quoted(text: str) -> str:
    """A text as a string of Python or JSON."""
    return json.dumps(text, ensure_ascii=False)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], figures: int) -> str:
    """A table of cells that are Markdown already, whose last ``figures`` columns are aligned to the right."""
    aligned = ["---" if index < len(header) - figures else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, aligned, *rows))
