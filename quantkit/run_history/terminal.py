"""Runs of the history as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quantkit.gates.record import VariantRecord
from quantkit.run_history.record import RunRecord
from quantkit.system.fitted_table import FittedTable, Shown

_COLUMNS = (
    ("Run", 0, True),
    ("Began (UTC)", 4, True),
    ("Recipe", 6, False),
    ("Kind", 7, False),
    ("Status", 1, False),
    ("Variant", 0, False),
    ("Size", 3, True),
    ("KL, worst text", 2, True),
    ("Perplexity, worst text", 2, True),
    ("Decode, tokens/s", 5, True),
)
"""Titles of the columns of runs, the rank of each, and whether it is a number, which is never wrapped."""


def to_json(record: RunRecord) -> dict[str, Any]:
    """A run as JSON data; figures as ``{"metric", "text", "figure", "value"}``."""
    data = asdict(record)
    for variant in [*data["variants"], *([data["baseline"]] if data["baseline"] else [])]:
        variant["figures"] = [
            {"metric": metric, "text": text, "figure": figure, "value": value}
            for (metric, text, figure), value in variant["figures"].items()
        ]
    return data


def runs_table(records: Sequence[RunRecord], variant: str | None = None, *, everything: bool = False) -> FittedTable:
    """One row for each variant of each run, or for the run that has none; a star marks what is accepted.

    Args:
        records: the runs, from above to below; the error of one stands below the table.
        variant: of this one alone.
        everything: all columns, in further tables where they do not fit into one.
    """
    from rich.text import Text

    rows: list[list[str]] = []
    for record in records:
        told = [str(record.id), record.started[:16].replace("T", " "), record.name, record.kind, _status(record)]
        wanted = [each for each in record.variants if variant in (None, each.name)]
        for each in wanted:
            mark = " *" if each.name in record.accepted else ""
            rows.append([*told, f"{each.name}{mark}", *_figures(each)])
        if not wanted:
            rows.append([*told, "", "", "", "", ""])
    cells = list(zip(*rows, strict=True)) or [()] * len(_COLUMNS)
    shown = [
        Shown(title, [Text(cell) for cell in column], rank, number)
        for (title, rank, number), column in zip(_COLUMNS, cells, strict=True)
    ]
    notes = [Text(f"run {record.id}: {record.error}", style="red") for record in records if record.error]
    if any(row[5].endswith(" *") for row in rows):
        notes.append(Text("* accepted: checks compare with it"))
    return FittedTable(shown, notes=notes, everything=everything, remedy="--all-columns shows every column")


def run_lines(record: RunRecord) -> list[str]:
    """All of a run that fits a terminal; its JSON has the rest."""
    lines = [
        f"run {record.id}: {record.name}, {record.kind}, {_status(record)}",
        f"began {record.started}, ended {record.finished}",
        f"model {record.source}, content {(record.source_fingerprint or 'unknown')[:12]}",
        f"calibration {(record.calibration_fingerprint or 'none')[:12]}",
        f"device {record.device}; {record.cpu}, {record.cores} cores; {record.platform}",
        "packages " + ", ".join(f"{name} {version}" for name, version in sorted(record.packages.items())),
    ]
    lines += [f"error: {record.error}"] if record.error else []
    for variant in record.variants:
        mark = " (accepted)" if variant.name in record.accepted else ""
        lines.append(f"{variant.name}{mark}: {variant.error or variant.scheme}")
        lines += [
            f"  {'.'.join(part for part in (metric, text, figure) if part)} = {value:.6g}"
            for (metric, text, figure), value in sorted(variant.figures.items())
        ]
    return lines


def _status(record: RunRecord) -> str:
    return record.verdict or record.status


def _figures(variant: VariantRecord) -> list[str]:
    if variant.status != "ok":
        return ["failed", "", "", ""]
    size = variant.figures.get(("size_bytes", "", ""))
    speed = variant.figures.get(("speed", "", "decode_tokens_per_second"))
    return [
        "" if size is None else f"{size / 2**20:,.1f} MiB",
        _worst(variant, "kl_divergence", "mean"),
        _worst(variant, "perplexity", ""),
        "" if speed is None else f"{speed:.4g}",
    ]


def _worst(variant: VariantRecord, metric: str, figure: str) -> str:
    values = [value for key, value in variant.figures.items() if (key[0], key[2]) == (metric, figure)]
    return f"{max(values):.5g}" if values else ""
