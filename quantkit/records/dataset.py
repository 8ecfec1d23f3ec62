"""A record, a set of records, and how one is made from rows without losing any silently."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError
from quantkit.records.formats import Record, UnusableError, check_columns, parse

FORMATS_HELP = (
    "a record has 'instruction' and 'output', or 'messages', or 'conversations', or 'text'; "
    "rename other columns in the data set"
)
HAS_IMAGES = "has images, and is scored as text alone"
_REASONS_SHOWN = 3
_ADDRESS = re.compile(r"(data|https?|file):", re.IGNORECASE)

Convert = Callable[[object], object]
"""Makes of a row one that :func:`quantkit.records.formats.parse` knows; may raise UnusableError."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that could not be used.

    Attributes:
        index: its place among the rows of the data set, from 0.
        reason: why.
    """

    index: int
    reason: str


@dataclass(frozen=True)
class RecordSet:
    """The usable records of a data set, and the rows that were not.

    Attributes:
        name: what messages and reports call it.
        origin: where it came from, as JSON data: ``kind`` (file, bundled or hub) and what identifies the content,
            the file's SHA-256 or the hub id with its commit. Equal to what :func:`quantkit.records.identify` gives.
        sha256: of the file's bytes; for a hub data set, of the records as :func:`records_sha256` defines.
        records: in the order of the data set.
        skipped: in the order of the data set.
        unchecked: names of files of the hub whose hashes could not be compared.
    """

    name: str
    origin: dict[str, Any]
    sha256: str
    records: list[Record]
    skipped: list[Skipped]
    unchecked: tuple[str, ...] = ()

    @property
    def read(self) -> int:
        """Rows in the data set, usable or not."""
        return len(self.records) + len(self.skipped)

    def indices(self) -> list[int]:
        """For each of ``records``, its row's index in the data set."""
        left_out = {skipped.index for skipped in self.skipped}
        return [index for index in range(self.read) if index not in left_out]


def collect(
    name: str,
    rows: Iterable[object],
    columns: Mapping[str, str] | None = None,
    convert: Convert | None = None,
    base: Path | None = None,
) -> tuple[list[Record], list[Skipped]]:
    """Parse every row of a data set.

    Args:
        name: of the data set.
        rows: of it.
        columns: see :func:`quantkit.records.formats.parse`.
        convert: is asked for what to parse instead of each row.
        base: the folder in which paths of images start.

    Raises:
        CalibrationError: ``columns`` has an unknown key, or no row is usable.
    """
    check_columns(columns)
    records: list[Record] = []
    skipped: list[Skipped] = []
    for index, row in enumerate(rows):
        try:
            record = parse(convert(row) if convert else row, columns)
            records.append(_placed(record, base) if record.images and base else record)
        except UnusableError as error:
            skipped.append(Skipped(index, error.reason))
    if not records:
        raise _nothing_usable(name, skipped)
    return records, skipped


def without_images(found: RecordSet) -> RecordSet:
    """A data set of whose records those with images are skipped, for who reads texts alone.

    Raises:
        CalibrationError: no other is left.
    """
    seen = [index for record, index in zip(found.records, found.indices(), strict=True) if record.images]
    if not seen:
        return found
    kept = [record for record in found.records if not record.images]
    if not kept:
        raise CalibrationError(
            f"data set '{found.name}': each of its {len(seen)} records has images, and is scored as text alone",
            "give records of texts",
        )
    skipped = [*found.skipped, *(Skipped(index, HAS_IMAGES) for index in seen)]
    return replace(found, records=kept, skipped=sorted(skipped, key=lambda row: row.index))


def _placed(record: Record, base: Path) -> Record:
    """A record whose images lie where the data set means them to."""
    images = (each if isinstance(each, bytes) or _ADDRESS.match(each) else str(base / each) for each in record.images)
    return replace(record, images=tuple(images))


def records_sha256(records: Iterable[Record]) -> str:
    """SHA-256 over one line of JSON a record: ``[[[role, content], ...], text]``, UTF-8, each ended by a newline.

    A record with images has a third entry: for each its path or address, of bytes their SHA-256.
    """
    digest = hashlib.sha256()
    for record in records:
        turns = [[message.role, message.content] for message in record.messages]
        images = [each if isinstance(each, str) else hashlib.sha256(each).hexdigest() for each in record.images]
        line = json.dumps(
            [turns, record.text, *([images] if images else [])], ensure_ascii=False, separators=(",", ":")
        )
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _nothing_usable(name: str, skipped: list[Skipped]) -> CalibrationError:
    if not skipped:
        return CalibrationError(f"{name} holds no records", FORMATS_HELP)
    counts = Counter(row.reason for row in skipped).most_common(_REASONS_SHOWN)
    reasons = "; ".join(f"{count} x {reason}" for reason, count in counts)
    return CalibrationError(f"{name}: none of its {len(skipped)} records can be used: {reasons}", FORMATS_HELP)
