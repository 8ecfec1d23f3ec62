"""Files as a server computes with them, beside what the loader found: losses, tasks, and speed by batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.report.columns import Record, is_decoded, reference_name, rows_of, texts_of
from quantkit.report.numbers import ABSENT, decimals_for, figure, fixed, in_bytes, margin, percent, pick
from quantkit.report.tasks_and_answers import KINDS, LEAST_DECIMALS

TEXT_METRICS = ("perplexity", "kl_divergence", "top1_agreement")


@dataclass(frozen=True, slots=True)
class ServedTable:
    """A table whose first column names rows.

    Attributes:
        title: what it is of.
        header: titles of the columns.
        rows: their cells.
    """

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class Served:
    """What there is to tell of files as they are served.

    Attributes:
        by: by whom, with what.
        tables: of losses text by text, of tasks and answers, and of speed.
        missing: of each file that is not served, the reason.
    """

    by: list[str]
    tables: list[ServedTable]
    missing: list[str]


def build_served(report: Record) -> Served | None:
    """All of it; None where nothing was served."""
    names = [reference_name(report), *(str(variant["name"]) for variant in report["variants"])]
    models = list(zip(names, rows_of(report), strict=True))
    asked = [(name, row) for name, row in models if isinstance(row.get("served"), dict)]
    having = [(name, row) for name, row in asked if not pick(row, "served", "missing")]
    if not asked:
        return None
    tables = [_losses(having, text) for text in texts_of(report)] + [_further(having), _speed(having)]
    return Served(
        list(dict.fromkeys(_by(row["served"]) for _, row in having)),
        [table for table in tables if table.rows],
        [f"{name}: {row['served']['missing']}" for name, row in asked if pick(row, "served", "missing")],
    )


def served_losses(row: Record) -> list[tuple[str, str, str, str]]:
    """Of one file for each text: its name, and perplexity, divergence and agreement as it is served."""
    metrics = pick(row, "served", "metrics") or {}
    texts = dict.fromkeys(text for metric in TEXT_METRICS for text in metrics.get(metric) or {})
    return [
        (
            str(text),
            fixed(figure(metrics, "perplexity", text), 4),
            fixed(figure(metrics, "kl_divergence", text, "mean"), 5),
            percent(figure(metrics, "top1_agreement", text), 2),
        )
        for text in texts
    ]


def served_speeds(row: Record) -> list[str]:
    """Of one file a line for each number of rows at once: tokens per second of all of them."""
    table = _speed([("", row)])
    return [
        f"{title.partition(', ')[2]}: prefill {prefill} and decode {decode} tokens per second"
        for cells in table.rows
        for title, prefill, decode in zip(table.header[2::2], cells[2::2], cells[3::2], strict=True)
    ]


def served_by(row: Record) -> str:
    """Who served a file, with what; empty where nobody did."""
    served = row.get("served")
    return _by(served) if isinstance(served, dict) and not served.get("missing") else ""


def _by(served: Record) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in (served.get("settings") or {}).items())
    threads = figure(served, "threads")
    told = f"{served.get('by')} {served.get('version') or ''}".strip() + f" in {served.get('dtype')}"
    told += f" on {served.get('device')}" + ("" if threads is None else f", {threads:.0f} threads")
    return f"{told}; {settings}" if settings else told


def _losses(models: Sequence[tuple[str, Record]], text: str) -> ServedTable:
    """What each loses on a text by who loaded it, and as it is served."""
    paths = {
        "KL": ("metrics", "kl_divergence", text, "mean"),
        "Perplexity": ("metrics", "perplexity", text),
        "Top-1": ("metrics", "top1_agreement", text),
    }
    header, columns = ["Variant", "Scored by"], []
    for title, path in paths.items():
        both = [[figure(row, *path) for _, row in models], [figure(row, "served", *path) for _, row in models]]
        if any(value is not None for value in both[1]):
            header += [title, f"{title} as served"]
            columns += [_written(title, values, [*both[0], *both[1]]) for values in both]
    loaders = ["reference decoder" if is_decoded(row) else str(row.get("loaded_by") or ABSENT) for _, row in models]
    rows = [[name, loaders[place], *(column[place] for column in columns)] for place, (name, _) in enumerate(models)]
    return ServedTable(f"On {text}", header, rows if columns else [])


def _written(title: str, values: Sequence[float | None], both: Sequence[float | None]) -> list[str]:
    if title == "Top-1":
        return [percent(value) for value in values]
    places = decimals_for(both, most=5) if title == "KL" else decimals_for(both, digits=4, most=3)
    return [fixed(value, places) for value in values]


def _further(models: Sequence[tuple[str, Record]]) -> ServedTable:
    """Tasks and answers: a row for each figure of each file."""
    rows = []
    for kind in KINDS:
        for name, row in models:
            for key in pick(row, "served", "metrics", kind) or {}:
                both = [_with_error(row, "metrics", kind, key), _with_error(row, "served", "metrics", kind, key)]
                rows.append([f"answers.{key}" if kind == "answers" else str(key), name, *both])
    return ServedTable("Tasks and answers", ["Figure", "Variant", "Scored", "As served"], rows)


def _with_error(row: Record, *path: str) -> str:
    value, error = figure(row, *path, "value"), figure(row, *path, "stderr")
    places = decimals_for([error], digits=2, least=LEAST_DECIMALS, most=6)
    return fixed(value, places) if value is None or error is None else f"{fixed(value, places)} {margin(error, places)}"


def _speed(models: Sequence[tuple[str, Record]]) -> ServedTable:
    """Tokens per second of all rows together, by how many there are."""
    speeds = [(name, row, pick(row, "served", "speed") or {}) for name, row in models]
    sizes = sorted({int(each["size"]) for _, _, speed in speeds for each in speed.get("batches") or []})
    header = ["Variant", "Weights", "Prefill, 1 row", "Decode, 1 row"]
    header += [f"{what}, {size} rows" for size in sizes for what in ("Prefill", "Decode")]
    rows = []
    for name, row, speed in speeds:
        if not speed:
            continue
        by_size: dict[int, Any] = {int(each["size"]): each for each in speed.get("batches") or []}
        cells = [_rate(figure(speed, what, "tokens_per_second")) for what in ("prefill", "decode")]
        cells += [
            _rate(figure(by_size.get(size), f"{what}_tokens_per_second"))
            for size in sizes
            for what in ("prefill", "decode")
        ]
        rows.append([name, in_bytes(figure(row, "served", "weights_bytes")), *cells])
    return ServedTable("Tokens per second", header, rows)


def _rate(value: float | None) -> str:
    return fixed(value, 0 if value is not None and value >= 100 else 1)
