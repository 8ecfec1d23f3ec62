"""llama.cpp's table of divergence, of each text: a row a figure, under llama.cpp's own names, a column a variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.report.columns import Record, rows_of, texts_of
from quantkit.report.numbers import ABSENT, figure, fixed, margin, pick

_QUANTILES = (
    *(("max", "Maximum"), ("p999", "99.9%"), ("p99", "99.0%"), ("p95", "95.0%"), ("p90", "90.0%"), ("p75", "75.0%")),
    *(("median", "Median"), ("p25", "25.0%"), ("p10", "10.0%"), ("p5", "5.0%"), ("p1", "1.0%"), ("p01", "0.1%")),
    ("min", "Minimum"),
)
_QUARTILES = ("p75", "p25")
"""llama.cpp prints them of Δp alone."""
_ALONE = (
    ("perplexity", "Mean PPL(Q)"),
    ("perplexity_reference", "Mean PPL(base)"),
    ("correlation", "Cor(ln(PPL(Q)), ln(PPL(base)))"),
    ("ln_perplexity_ratio", "Mean ln(PPL(Q)/PPL(base))"),
    ("perplexity_ratio", "Mean PPL(Q)/PPL(base)"),
    ("perplexity_difference", "Mean PPL(Q)-PPL(base)"),
)


@dataclass(frozen=True, slots=True)
class DivergenceTable:
    """The table of a text.

    Attributes:
        text: its name.
        names: of the variants, in the order of the cells.
        groups: title, and rows of a figure's name with a cell for each variant.
    """

    text: str
    names: list[str]
    groups: list[tuple[str, list[tuple[str, list[str]]]]]


def divergence_tables(report: Record) -> list[DivergenceTable]:
    """The tables of all texts, of the variants that have one."""
    found = []
    scored = list(zip(report["variants"], rows_of(report)[1:], strict=True))
    for text in texts_of(report):
        having = [(str(variant["name"]), row) for variant, row in scored if _table(row, text)]
        if having:
            tables = [_table(row, text) for _, row in having]
            found.append(DivergenceTable(text, [name for name, _ in having], _groups(tables)))
    return found


def _table(row: Record, text: str) -> Any:
    found = pick(row, "texts", text, "divergence")
    return found if isinstance(found, Mapping) else None


def _groups(tables: list[Any]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    alone = [_row(name, tables, key, share=key == "correlation") for key, name in _ALONE]
    kl = [_row("Mean KLD", tables, "kl_divergence", "mean")]
    kl += [_row(f"{name} KLD", tables, "kl_divergence", key) for key, name in _QUANTILES if key not in _QUARTILES]
    delta = [_row("Mean Δp", tables, "delta_p", "mean", share=True)]
    delta += [_row(f"{name} Δp", tables, "delta_p", key, share=True) for key, name in _QUANTILES]
    delta += [_row("RMS Δp", tables, "rms_delta_p", share=True), _row("Same top p", tables, "same_top", share=True)]
    groups = [("Perplexity", alone), ("KL divergence, nats", kl), ("Token probability", delta)]
    shown = [(title, [row for row in rows if any(cell != ABSENT for cell in row[1])]) for title, rows in groups]
    return [(title, rows) for title, rows in shown if rows]


def _row(name: str, tables: list[Any], key: str, part: str = "", *, share: bool = False) -> tuple[str, list[str]]:
    """A figure of all variants to llama.cpp's decimals, shares as percentages, each with its standard error."""
    return name, [_cell(*_figures(table, key, part), share=share) for table in tables]


def _figures(table: Any, key: str, part: str) -> tuple[float | None, float | None]:
    if key == "correlation":
        return figure(table, key), None
    if not part:
        return figure(table, key, "value"), figure(table, key, "stderr")
    return figure(table, key, part), figure(table, key, "stderr") if part == "mean" else None


def _cell(value: float | None, error: float | None, *, share: bool) -> str:
    factor, places, unit = (100.0, 3, "%") if share else (1.0, 6, "")
    if value is None:
        return ABSENT
    written = fixed(value * factor, places)
    return f"{written}{unit}" if error is None else f"{written} {margin(error * factor, places)}{unit}"
