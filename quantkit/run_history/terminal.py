"""Runs of the history as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from quantkit.gates.record import VariantRecord
from quantkit.run_history.record import RunRecord

if TYPE_CHECKING:
    from rich.table import Table


def to_json(record: RunRecord) -> dict[str, Any]:
    """A run as JSON data; figures as ``{"metric", "text", "figure", "value"}``."""
    data = asdict(record)
    for variant in [*data["variants"], *([data["baseline"]] if data["baseline"] else [])]:
        variant["figures"] = [
            {"metric": metric, "text": text, "figure": figure, "value": value}
            for (metric, text, figure), value in variant["figures"].items()
        ]
    return data


def runs_table(records: Sequence[RunRecord], variant: str | None = None) -> Table:
    """One row for each variant of each run, or for the run that has none; a star marks what is accepted."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for title in ("Run", "Began (UTC)", "Recipe", "Kind", "Status", "Variant"):
        table.add_column(title, overflow="fold")
    for title in ("Size", "KL, worst text", "Perplexity, worst text", "Decode, tokens/s"):
        table.add_column(title, justify="right")
    for record in records:
        told = [str(record.id), record.started[:16].replace("T", " "), record.name, record.kind, _status(record)]
        rows = [each for each in record.variants if variant in (None, each.name)]
        for each in rows:
            mark = " *" if each.name in record.accepted else ""
            table.add_row(*map(Text, [*told, f"{each.name}{mark}", *_figures(each)]))
        if not rows:
            table.add_row(*map(Text, [*told, record.error or "", "", "", "", ""]))
    return table


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
