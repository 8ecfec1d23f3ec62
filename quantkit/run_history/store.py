"""The history's file: append a run, read runs, accept one."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from quantkit.errors import QuantkitError, did_you_mean
from quantkit.run_history.connection import reading, writing
from quantkit.run_history.record import RunRecord
from quantkit.run_history.rows import VARIANT, insert_run, references, select_run

DEFAULT_FILE = Path("reports/history.sqlite")
"""Where recipes with a folder of their own in ``reports`` leave their records."""


class Accepted(NamedTuple):
    """The run that is a variant's reference, and when it was accepted."""

    run: int
    moment: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which runs are asked for; what is None does not matter.

    Attributes:
        name: of the recipe.
        variant: runs that have it.
        status: of the run, or its verdict.
        since: ISO date or moment.
        last: so many, the newest.
    """

    name: str | None = None
    variant: str | None = None
    status: str | None = None
    since: str | None = None
    last: int | None = None


class History:
    """A history. Each call opens its file and closes it again, so that nothing is held while a run works.

    Args:
        file: SQLite file; :meth:`append` makes it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def check(self) -> None:
        """Find out before any work whether the file can be read, if it is there.

        Raises:
            QuantkitError: it is damaged, no history, or of a newer version.
        """
        if self.file.exists():
            with reading(self.file) as connection:
                connection.execute("SELECT count(*) FROM runs").fetchone()

    def append(self, record: RunRecord) -> int:
        """Add a run, and return its number.

        Raises:
            QuantkitError: the file cannot be written; then it is as it was.
        """
        with writing(self.file) as connection:
            return insert_run(connection, record)

    def run(self, number: int, *, whole: bool = True) -> RunRecord:
        """A run by its number; without ``whole`` its variants lack layers, and their texts windows.

        Raises:
            QuantkitError: there is no such run; the file cannot be read.
        """
        with reading(self.file) as connection:
            return _run(connection, number, self.file, whole)

    def runs(self, wanted: Wanted = Wanted()) -> list[RunRecord]:
        """The runs that are asked for, oldest first, without layers and windows.

        Raises:
            QuantkitError: the file cannot be read.
        """
        query, values = _query(wanted)
        with reading(self.file) as connection:
            numbers = [number for (number,) in connection.execute(query, values)]
            return [_run(connection, number, self.file, whole=False) for number in reversed(numbers)]

    def references(self, name: str) -> dict[str, Accepted]:
        """For each variant of a recipe the run that is its reference; empty where the file is not there yet."""
        if not self.file.exists():
            return {}
        with reading(self.file) as connection:
            return {variant: Accepted(*found) for variant, found in references(connection, name).items()}

    def latest(self, name: str | None = None) -> int:
        """The number of the newest run that has a variant to accept.

        Raises:
            QuantkitError: there is none; or the file holds runs of several recipes and no name is given.
        """
        with reading(self.file) as connection:
            done = "SELECT run FROM variants WHERE role = ? AND status = 'ok'"
            query = f"SELECT name, max(id) FROM runs WHERE id IN ({done}) GROUP BY name ORDER BY name"
            newest = dict(connection.execute(query, (VARIANT,)))
        if name is not None and name in newest:
            return int(newest[name])
        if name is not None or not newest:
            remedy = did_you_mean(name or "", newest) if newest else "run the recipe first"
            raise QuantkitError(f"{self.file} has no finished run{f' of {name}' if name else ''}", remedy)
        if len(newest) > 1:
            raise QuantkitError(f"{self.file} holds runs of {', '.join(newest)}", "say which with --name")
        return int(next(iter(newest.values())))

    def accept(self, number: int, variants: Sequence[str] = ()) -> RunRecord:
        """Make a run the reference of its variants, or of some of them, and return it.

        Raises:
            QuantkitError: there is no such run or variant, or the variant failed.
        """
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        if not self.file.is_file():
            raise QuantkitError(f"there is no history {self.file}", "run a recipe first, or name its file with --file")
        with writing(self.file) as connection:
            record = _run(connection, number, self.file, whole=False)
            for variant in _acceptable(record, variants):
                row = (record.name, variant, number, moment)
                connection.execute("INSERT INTO accepted (name, variant, run, moment) VALUES (?, ?, ?, ?)", row)
            return _run(connection, number, self.file, whole=False)


def _acceptable(record: RunRecord, wanted: Sequence[str]) -> list[str]:
    done = [variant.name for variant in record.variants if variant.status == "ok"]
    for name in wanted:
        variant = record.variant(name)
        if variant is None:
            known = [each.name for each in record.variants]
            raise QuantkitError(f"run {record.id} has no variant '{name}'", did_you_mean(name, known))
        if variant.status != "ok":
            raise QuantkitError(f"run {record.id}: variant {name} failed: {variant.error}", "accept another run")
    if not done:
        raise QuantkitError(f"run {record.id} has no finished variant", "accept another run")
    return list(wanted) or done


def _run(connection: sqlite3.Connection, number: int, file: Path, whole: bool) -> RunRecord:
    found = select_run(connection, number, whole=whole)
    if found is None:
        last = connection.execute("SELECT max(id) FROM runs").fetchone()[0]
        remedy = f"'quantkit history' lists them; the newest is {last}" if last else "it holds no runs yet"
        raise QuantkitError(f"{file} has no run {number}", remedy)
    return found


def _query(wanted: Wanted) -> tuple[str, list[object]]:
    conditions, values = ["1"], list[object]()
    if wanted.name is not None:
        conditions.append("name = ?")
        values.append(wanted.name)
    if wanted.variant is not None:
        conditions.append("id IN (SELECT run FROM variants WHERE role = ? AND name = ?)")
        values += [VARIANT, wanted.variant]
    if wanted.status is not None:
        conditions.append("? IN (status, verdict)")
        values.append(wanted.status)
    if wanted.since is not None:
        conditions.append("started >= ?")
        values.append(wanted.since)
    limit = -1 if wanted.last is None else wanted.last
    return f"SELECT id FROM runs WHERE {' AND '.join(conditions)} ORDER BY id DESC LIMIT {int(limit)}", values
