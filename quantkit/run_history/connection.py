"""Open the history's file: writers one at a time, readers that change nothing, and what goes wrong in one line."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from quantkit.errors import OutputError, QuantkitError
from quantkit.run_history.schema import APPLICATION_ID, STEPS, VERSION, statements
from quantkit.system.distribution import upgrade_line
from quantkit.system.os_errors import translated_os_errors

PATIENCE = 30.0
"""Seconds that a writer waits for another one."""


@contextmanager
def writing(file: Path) -> Iterator[sqlite3.Connection]:
    """The one transaction of a writer: all of it is in the file when the block ends well, else nothing.

    The file is made if it is not there, and brought to the newest version. It keeps SQLite's rollback journal rather
    than a write-ahead log, so that it is a single file between runs and may lie on a network share.

    Raises:
        QuantkitError: the file is no history, damaged, or of a newer version; it cannot be written.
    """
    with _told(file), translated_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(_open(file, "rwc")) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("BEGIN IMMEDIATE")
            try:
                migrate(connection, file)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise


@contextmanager
def reading(file: Path) -> Iterator[sqlite3.Connection]:
    """A connection that changes nothing: a file of an older version is migrated in memory.

    Raises:
        QuantkitError: there is no such file; it is no history, damaged, or of a newer version.
    """
    if not file.is_file():
        raise QuantkitError(f"there is no history {file}", "run a recipe first, or name its file with --file")
    with _told(file), closing(_open(file, "rw" if _writable(file) else "ro")) as connection:
        connection.execute("PRAGMA query_only = ON")
        version = check_version(connection, file)
        if version == VERSION:
            connection.execute("BEGIN")
            yield connection
            return
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
            connection.backup(copy)
            migrate(copy, file)
            yield copy


def migrate(connection: sqlite3.Connection, file: Path) -> None:
    """Bring a file to the newest version; the caller's transaction makes it all or nothing.

    Raises:
        QuantkitError: it is of a newer version, or no history.
    """
    version = check_version(connection, file)
    for step in STEPS[version:]:
        for statement in statements(step):
            connection.execute(statement)
    if version < VERSION:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")


def check_version(connection: sqlite3.Connection, file: Path) -> int:
    """The version of a file; 0 for one that is empty.

    Raises:
        QuantkitError: it is of a newer version, or an SQLite file of somebody else.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    owner: int = connection.execute("PRAGMA application_id").fetchone()[0]
    tables: int = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if owner != APPLICATION_ID and (tables or version):
        raise QuantkitError(f"{file} is not a history of quantkit", "name another file in history.file")
    if version > VERSION:
        raise QuantkitError(
            f"history {file} has version {version}, and this quantkit knows up to {VERSION}",
            upgrade_line(),
        )
    return version


def _open(file: Path, mode: str) -> sqlite3.Connection:
    address = f"{file.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(address, uri=True, timeout=PATIENCE, isolation_level=None)


def _writable(file: Path) -> bool:
    """Whether a reader may finish what a killed writer left: that takes writing the file and its journal."""
    return os.access(file, os.W_OK) and os.access(file.absolute().parent, os.W_OK)


_REMEDIES = {
    "SQLITE_FULL": ("the disk is full", "free some disk space; the file is as it was"),
    "SQLITE_READONLY": ("it is read-only", "change its permissions, or name another file in history.file"),
    "SQLITE_CANTOPEN": ("it cannot be opened", "check the folder's permissions, or name another file in history.file"),
    "SQLITE_BUSY": (
        f"another process has been writing it for {PATIENCE:.0f} seconds",
        "run the command again when that is done",
    ),
    "SQLITE_IOERR": ("the disk reports a fault or is full", "check the disk; the file is as it was"),
    "SQLITE_NOTADB": ("it is not an SQLite file", "name another file in history.file, or move this one away"),
    "SQLITE_CORRUPT": (
        "it is damaged",
        "restore it from a backup, or save what is left with 'sqlite3 FILE .recover' and move it away",
    ),
}


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """What SQLite refuses, in one line that names the file and the remedy."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        kind = next((kind for kind in _REMEDIES if name.startswith(kind)), None)
        otherwise = (str(error), "its tables are not as quantkit made them: move the file away, or name another one")
        problem, remedy = _REMEDIES[kind] if kind else otherwise
        raise OutputError(f"history {file}: {problem}", remedy) from error
