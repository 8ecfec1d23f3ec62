"""The comparison as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantkit.report.columns import Record, build_columns, reference_name, scheme_name, texts_of
from quantkit.report.comparison import failure
from quantkit.report.numbers import ABSENT
from quantkit.report.tasks_and_answers import further_columns

if TYPE_CHECKING:
    from rich.table import Table


MOST_FURTHER = 5
"""Figures of tasks and answers that the table has columns for; the report shows more of them."""


def table(report: dict[str, Any]) -> Table:
    """The comparison in short: size, loss on each text, memory beside its estimate and speed, the best in green.

    A failed variant has a row that says so, and its error below the table.
    """
    from rich.table import Table
    from rich.text import Text

    further = further_columns(report)
    columns = build_columns(report) | further
    keys = [key for key in _keys(report) if key in columns]
    keys += list(further) if len(further) <= MOST_FURTHER else []
    errors = [(str(row["name"]), error) for row in report["variants"] if (error := failure(row)) is not None]
    caption = Text("\n").join(Text(f"{name} failed: {error}", style="red") for name, error in errors)
    reference = reference_name(report)
    shown = Table(title=Text(f"{report['name']}, relative to {reference}"), caption=caption, caption_justify="left")
    shown.add_column("Variant", overflow="fold", min_width=12)
    shown.add_column("Scheme")
    for key in keys:
        text = "" if key in further else key.partition(":")[2]
        shown.add_column(Text(f"{columns[key].title} {text}".strip()), justify="right")
    failed = {name for name, _ in errors}
    for index, (name, scheme) in enumerate(_rows(report)):
        cells = [columns[key].cells[index] for key in keys]
        figures = [Text(cell.text, style="bold green" if cell.best else "") for cell in cells]
        if index and name in failed:
            figures = [Text("failed", style="red"), *figures[1:]] if figures else []
        shown.add_row(Text(name), Text(scheme), *figures)
    return shown


def _keys(report: Record) -> list[str]:
    per_text = [f"{key}:{text}" for text in texts_of(report) for key in ("mean", "perplexity")]
    return ["size", "ratio", "blocks", *per_text, "at_prefill", "estimate_ratio", "decode"]


def _rows(report: Record) -> list[tuple[str, str]]:
    rows = [(str(variant["name"]), _scheme(variant)) for variant in report["variants"]]
    return [(reference_name(report), ABSENT), *rows]


def _scheme(variant: Record) -> str:
    return f"{variant.get('method') or ''} {scheme_name(variant)}".strip()
