"""Records to rows of the history."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict

from quantkit.run_history.record import RunRecord, TextRecord, VariantRecord
from quantkit.run_history.rows import BASELINE

RUN_COLUMNS = (
    "name", "kind", "started", "finished", "status", "error", "verdict", "quantkit", "recipe", "source",
    "source_fingerprint", "calibration_fingerprint", "device", "cpu", "cores", "driver", "platform", "folder",
)  # fmt: skip
VARIANT_COLUMNS = (
    "name", "status", "error", "method", "format", "scheme", "loaded_by", "device", "cpu", "dtype", "threads",
    "content",
)  # fmt: skip
VARIANT = "variant"


def insert_run(connection: sqlite3.Connection, record: RunRecord) -> int:
    """Add a run with all that belongs to it, and return its number."""
    values = {name: getattr(record, name) for name in RUN_COLUMNS}
    values["recipe"] = json.dumps(record.recipe, ensure_ascii=False)
    run = _insert(connection, "runs", values)
    packages = [(run, package, version) for package, version in record.packages.items()]
    connection.executemany("INSERT INTO packages VALUES (?, ?, ?)", packages)
    if record.baseline is not None:
        _insert_variant(connection, run, BASELINE, -1, record.baseline)
    for position, variant in enumerate(record.variants):
        _insert_variant(connection, run, VARIANT, position, variant)
    return run


def _insert_variant(connection: sqlite3.Connection, run: int, role: str, position: int, record: VariantRecord) -> None:
    given = {name: getattr(record, name) for name in VARIANT_COLUMNS}
    variant = _insert(connection, "variants", {"run": run, "role": role, "position": position, **given})
    figures = [(variant, *key, value) for key, value in record.figures.items()]
    connection.executemany("INSERT INTO figures VALUES (?, ?, ?, ?, ?)", figures)
    timings = [
        (variant, what, index, seconds)
        for what, samples in record.timings.items()
        for index, seconds in enumerate(samples)
    ]
    connection.executemany("INSERT INTO timings VALUES (?, ?, ?, ?)", timings)
    layers = [
        (variant, index, layer.name, layer.scheme, layer.error_before, layer.error_after)
        for index, layer in enumerate(record.layers)
    ]
    connection.executemany("INSERT INTO layers VALUES (?, ?, ?, ?, ?, ?)", layers)
    for name, text in record.texts.items():
        _insert_text(connection, variant, name, text)


def _insert_text(connection: sqlite3.Connection, variant: int, name: str, text: TextRecord) -> None:
    about = (variant, name, text.token_ids_sha256, text.context_length, text.tokens_per_window)
    connection.execute("INSERT INTO texts VALUES (?, ?, ?, ?, ?)", about)
    nothing = [None] * len(text.nll)
    windows = zip(text.nll, text.kl or nothing, text.agreements or nothing, strict=True)
    connection.executemany(
        "INSERT INTO windows VALUES (?, ?, ?, ?, ?, ?)",
        [(variant, name, index, *sums) for index, sums in enumerate(windows)],
    )
    for departure in text.departures:
        _insert(connection, "departures", {"variant": variant, "text": name, **asdict(departure)})


def _insert(connection: sqlite3.Connection, table: str, values: dict[str, object]) -> int:
    columns, marks = ", ".join(values), ", ".join("?" * len(values))
    cursor = connection.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", tuple(values.values()))
    return int(cursor.lastrowid or 0)
