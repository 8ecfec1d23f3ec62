"""Records to rows of the history, and rows to records."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from dataclasses import asdict, fields
from typing import Any

from quantkit.gates.record import BASELINE, Key, LayerRecord, TextRecord, TokenRecord, VariantRecord
from quantkit.run_history.record import RunRecord

RUN_COLUMNS = (
    "name", "kind", "started", "finished", "status", "error", "verdict", "quantkit", "recipe", "source",
    "source_fingerprint", "calibration_fingerprint", "device", "cpu", "cores", "driver", "platform", "folder",
)  # fmt: skip
VARIANT_COLUMNS = (
    "name", "status", "error", "method", "format", "scheme", "loaded_by", "device", "cpu", "dtype", "threads",
    "content",
)  # fmt: skip
VARIANT = "variant"
_TOKEN = ", ".join(field.name for field in fields(TokenRecord))


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


def select_run(connection: sqlite3.Connection, run: int, *, whole: bool) -> RunRecord | None:
    """A run, or None; without ``whole`` its variants lack layers, and their texts windows and departures."""
    row = connection.execute(f"SELECT {', '.join(RUN_COLUMNS)} FROM runs WHERE id = ?", (run,)).fetchone()
    if row is None:
        return None
    about: dict[str, Any] = dict(zip(RUN_COLUMNS, row, strict=True))
    about["recipe"] = json.loads(about["recipe"])
    packages = dict(connection.execute("SELECT package, version FROM packages WHERE run = ?", (run,)))
    now = references(connection, about["name"])
    baseline = _variants(connection, run, BASELINE, whole)
    return RunRecord(
        **about,
        packages=packages,
        baseline=baseline[0] if baseline else None,
        variants=tuple(_variants(connection, run, VARIANT, whole)),
        id=run,
        accepted=tuple(name for name, (reference, _) in now.items() if reference == run),
    )


def references(connection: sqlite3.Connection, name: str) -> dict[str, tuple[int, str]]:
    """For each variant of a recipe the run that is its reference, and when that was accepted."""
    newest = "SELECT max(id) FROM accepted WHERE name = ? GROUP BY variant"
    query = f"SELECT variant, run, moment FROM accepted WHERE id IN ({newest}) ORDER BY variant"
    return {variant: (run, moment) for variant, run, moment in connection.execute(query, (name,))}


def _variants(connection: sqlite3.Connection, run: int, role: str, whole: bool) -> list[VariantRecord]:
    query = f"SELECT id, {', '.join(VARIANT_COLUMNS)} FROM variants WHERE run = ? AND role = ? ORDER BY position"
    return [_variant(connection, *row, whole=whole) for row in connection.execute(query, (run, role)).fetchall()]


def _variant(connection: sqlite3.Connection, key: int, *given: Any, whole: bool) -> VariantRecord:
    figures: dict[Key, float] = {
        (metric, text, figure): value
        for metric, text, figure, value in connection.execute(
            "SELECT metric, text, figure, value FROM figures WHERE variant = ?", (key,)
        )
    }
    timings: defaultdict[str, list[float]] = defaultdict(list)
    query = "SELECT what, seconds_per_token FROM timings WHERE variant = ? ORDER BY what, repetition"
    for what, seconds in connection.execute(query, (key,)):
        timings[what].append(seconds)
    return VariantRecord(
        **dict(zip(VARIANT_COLUMNS, given, strict=True)),
        figures=figures,
        timings={what: tuple(samples) for what, samples in timings.items()},
        texts=_texts(connection, key, whole),
        layers=_layers(connection, key) if whole else (),
    )


def _layers(connection: sqlite3.Connection, variant: int) -> tuple[LayerRecord, ...]:
    query = "SELECT name, scheme, error_before, error_after FROM layers WHERE variant = ? ORDER BY position"
    return tuple(LayerRecord(*row) for row in connection.execute(query, (variant,)))


def _texts(connection: sqlite3.Connection, variant: int, whole: bool) -> dict[str, TextRecord]:
    query = "SELECT text, token_ids_sha256, context_length, tokens_per_window FROM texts WHERE variant = ?"
    found = {}
    for name, sha256, context_length, tokens in connection.execute(query, (variant,)).fetchall():
        if whole:
            sums, departures = _windows(connection, variant, name), _departures(connection, variant, name)
            found[name] = TextRecord(sha256, context_length, tokens, *sums, departures)
        else:
            found[name] = TextRecord(sha256, context_length, tokens, ())
    return found


def _windows(
    connection: sqlite3.Connection, variant: int, text: str
) -> tuple[tuple[float, ...], tuple[float, ...] | None, tuple[int, ...] | None]:
    query = "SELECT nll, kl, agreements FROM windows WHERE variant = ? AND text = ? ORDER BY window"
    nll, kl, agreements = zip(*connection.execute(query, (variant, text)), strict=True)
    return nll, None if None in kl else kl, None if None in agreements else agreements


def _departures(connection: sqlite3.Connection, variant: int, text: str) -> tuple[TokenRecord, ...]:
    query = f"SELECT {_TOKEN} FROM departures WHERE variant = ? AND text = ? ORDER BY kl_divergence DESC"
    return tuple(TokenRecord(*row) for row in connection.execute(query, (variant, text)))
