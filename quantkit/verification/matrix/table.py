"""The matrix as it is kept, and as people read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.system.artifacts import read_json

if TYPE_CHECKING:
    from rich.table import Table

MATRIX_FILE = Path(__file__).with_name("matrix.json")
WORKS, FAILS, UNTRIED = "works", "fails", "untried"
"""What a cell says: it was done and compared; it was done and went wrong; nobody did it."""
MARKS = {WORKS: "yes", FAILS: "no", UNTRIED: "?"}


def read_matrix() -> dict[str, Any]:
    """The matrix.

    Returns:
        ``rows``, each with ``format``, ``name``, ``keys`` of a variant, ``methods`` (name to state) and ``runtimes``
        (name to ``state``, ``reason`` and ``kl``), and ``versions`` of what they were done with.
    """
    found: dict[str, Any] = read_json(MATRIX_FILE)
    return found


def matrix_table(found: Mapping[str, Any]) -> Table:
    """A table with a row for each grid in each format, a column for each method and each runtime."""
    from rich.table import Table

    table = Table(caption=_caption(found), caption_justify="left")
    table.add_column("format", no_wrap=True)
    table.add_column("scheme", no_wrap=True)
    for name in _heads(found):
        table.add_column(name, justify="center")
    last = ""
    for row in found["rows"]:
        if last and row["format"] != last:
            table.add_section()
        table.add_row(row["format"] if row["format"] != last else "", row["name"], *_cells(row, found))
        last = row["format"]
    return table


def matrix_markdown(found: Mapping[str, Any]) -> str:
    """The same for a page."""
    head = ["format", "scheme", *_heads(found)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * 2}{':---:|' * (len(head) - 2)}"]
    lines += [f"| {' | '.join([row['format'], row['name'], *_cells(row, found)])} |" for row in found["rows"]]
    return "\n".join(lines)


def reasons_markdown(found: Mapping[str, Any]) -> str:
    """Why cells say no, each reason once with its rows."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in found["rows"]:
        for name, cell in row["runtimes"].items():
            if cell["state"] == FAILS:
                places.setdefault((name, cell["reason"]), []).append(f"{row['format']} {row['name']}")
    return "\n".join(f"- {name}: {', '.join(rows)}: {reason}" for (name, reason), rows in places.items())


def _heads(found: Mapping[str, Any]) -> list[str]:
    """The methods by which, and the runtimes in which."""
    return [*(f"by {name}" for name in found["methods"]), *(f"in {name}" for name in found["runtimes"])]


def _cells(row: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    methods = ["yes" if name in row["methods"] else "-" for name in found["methods"]]
    runtimes = [MARKS[row["runtimes"][name]["state"]] if name in row["runtimes"] else "-" for name in found["runtimes"]]
    return methods + runtimes


def _caption(found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"yes: done and compared; no: done and failed; -: not meant to; ?: not tried. With {versions}"
