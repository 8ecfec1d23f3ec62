"""The tables of the history, one step for each version of the file; ``PRAGMA user_version`` says which it has.

A new file is made by all steps in turn, so that what a migrated file looks like is what every file looks like.
"""

from __future__ import annotations

APPLICATION_ID = 0x716B6974
"""``PRAGMA application_id``: "qkit", by which the file is known from other SQLite files."""

_VERSION_1 = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    started TEXT NOT NULL,
    finished TEXT NOT NULL,
    status TEXT NOT NULL,
    error TEXT,
    verdict TEXT,
    quantkit TEXT NOT NULL,
    recipe TEXT NOT NULL,
    source TEXT NOT NULL,
    source_fingerprint TEXT,
    calibration_fingerprint TEXT,
    device TEXT NOT NULL,
    cpu TEXT NOT NULL,
    cores INTEGER NOT NULL,
    driver TEXT,
    platform TEXT NOT NULL,
    folder TEXT NOT NULL,
    accepted INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX runs_by_name ON runs (name, id);
CREATE TABLE packages (
    run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    package TEXT NOT NULL,
    version TEXT NOT NULL,
    PRIMARY KEY (run, package)
) WITHOUT ROWID;
CREATE TABLE variants (
    id INTEGER PRIMARY KEY,
    run INTEGER NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    role TEXT NOT NULL,
    position INTEGER NOT NULL,
    name TEXT NOT NULL,
    status TEXT NOT NULL,
    error TEXT,
    method TEXT NOT NULL,
    format TEXT NOT NULL,
    scheme TEXT NOT NULL,
    loaded_by TEXT,
    device TEXT NOT NULL,
    cpu TEXT NOT NULL,
    dtype TEXT NOT NULL,
    threads INTEGER NOT NULL,
    content TEXT,
    UNIQUE (run, role, name)
);
CREATE TABLE figures (
    variant INTEGER NOT NULL REFERENCES variants (id) ON DELETE CASCADE,
    metric TEXT NOT NULL,
    text TEXT NOT NULL,
    figure TEXT NOT NULL,
    value REAL NOT NULL,
    PRIMARY KEY (variant, metric, text, figure)
) WITHOUT ROWID;
CREATE TABLE timings (
    variant INTEGER NOT NULL REFERENCES variants (id) ON DELETE CASCADE,
    what TEXT NOT NULL,
    repetition INTEGER NOT NULL,
    seconds_per_token REAL NOT NULL,
    PRIMARY KEY (variant, what, repetition)
) WITHOUT ROWID;
CREATE TABLE layers (
    variant INTEGER NOT NULL REFERENCES variants (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    name TEXT NOT NULL,
    scheme TEXT NOT NULL,
    error_before REAL,
    error_after REAL,
    PRIMARY KEY (variant, position)
) WITHOUT ROWID;
CREATE TABLE texts (
    variant INTEGER NOT NULL REFERENCES variants (id) ON DELETE CASCADE,
    text TEXT NOT NULL,
    token_ids_sha256 TEXT NOT NULL,
    context_length INTEGER NOT NULL,
    tokens_per_window INTEGER NOT NULL,
    PRIMARY KEY (variant, text)
) WITHOUT ROWID;
CREATE TABLE windows (
    variant INTEGER NOT NULL REFERENCES variants (id) ON DELETE CASCADE,
    text TEXT NOT NULL,
    window INTEGER NOT NULL,
    nll REAL NOT NULL,
    kl REAL,
    agreements INTEGER,
    PRIMARY KEY (variant, text, window)
) WITHOUT ROWID;
"""
_VERSION_2 = """
CREATE TABLE departures (
    variant INTEGER NOT NULL REFERENCES variants (id) ON DELETE CASCADE,
    text TEXT NOT NULL,
    window INTEGER NOT NULL,
    position INTEGER NOT NULL,
    kl_divergence REAL NOT NULL,
    nll REAL NOT NULL,
    context TEXT NOT NULL,
    token TEXT NOT NULL,
    expected TEXT NOT NULL,
    predicted TEXT NOT NULL,
    PRIMARY KEY (variant, text, window, position)
) WITHOUT ROWID;
CREATE TABLE accepted (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    variant TEXT NOT NULL,
    run INTEGER NOT NULL REFERENCES runs (id),
    moment TEXT NOT NULL
);
CREATE INDEX accepted_by_variant ON accepted (name, variant, id);
INSERT INTO accepted (name, variant, run, moment)
    SELECT runs.name, variants.name, runs.id, runs.finished
    FROM runs JOIN variants ON variants.run = runs.id
    WHERE runs.accepted AND variants.role = 'variant' AND variants.status = 'ok'
    ORDER BY runs.id, variants.position;
ALTER TABLE runs DROP COLUMN accepted;
"""
STEPS = (_VERSION_1, _VERSION_2)
"""The statements that lead from version ``n`` to ``n + 1``. In 2 each variant has a reference of its own, and the
furthest tokens of each text are kept."""
VERSION = len(STEPS)


def statements(step: str) -> list[str]:
    """The single statements of a step; none holds a semicolon inside."""
    return [statement.strip() for statement in step.split(";") if statement.strip()]
