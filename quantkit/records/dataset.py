"""A record, a set of records, and how one is made from rows without losing any silently."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError
from quantkit.records.fields import check_columns, listed
from quantkit.records.formats import parse
from quantkit.records.record import Message, Record, UnusableError

FORMATS_HELP = (
    "a record has 'messages', or 'prompt' and 'response', or 'text'; say in the recipe what other columns are: "
    "'columns: {prompt: COLUMN, response: COLUMN}', and 'tags' for the roles of a conversation"
)
TOO_DEEP = "nested too deeply"
HAS_IMAGES = "has images, and is scored as text alone"
REASONS_SHOWN = 3
_ADDRESS = re.compile(r"(data|https?|file):", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Broken:
    """What stands where a row should be and cannot be read; ``reason`` says why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Layout:
    """How a data set calls what a record has; see :func:`quantkit.records.formats.parse`."""

    columns: Mapping[str, str] | None = None
    tags: Mapping[str, str] | None = None
    others: bool = True
    prompts: bool = False


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that could not be used.

    Attributes:
        index: its place among the rows of the data set, from 0.
        reason: why.
        keys: those that it has, as messages show them.
    """

    index: int
    reason: str
    keys: str = field(default="", compare=False)


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
    layout: Layout | None = None,
    base: Path | None = None,
) -> tuple[list[Record], list[Skipped]]:
    """Parse every row of a data set.

    Args:
        name: of the data set.
        rows: of it; those that could not be read are :class:`Broken`.
        layout: how they call what a record has.
        base: the folder in which paths of images start.

    Raises:
        CalibrationError: ``columns`` has an unknown key, or no row is usable.
    """
    layout = layout or Layout()
    check_columns(layout.columns)
    records: list[Record] = []
    skipped: list[Skipped] = []
    for index, row in enumerate(rows):
        try:
            if isinstance(row, Broken):
                raise UnusableError(row.reason)
            record = parse(row, layout.columns, layout.tags, others=layout.others, prompts=layout.prompts)
            records.append(_placed(record, base) if record.images and base else record)
        except RecursionError:
            skipped.append(Skipped(index, TOO_DEEP))
        except UnusableError as error:
            keys = listed(row) if isinstance(row, Mapping) else ""
            skipped.append(Skipped(index, error.reason, keys))
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

    A turn that holds more, such as calls, has a third entry with it. A record with images has a third entry: for each
    its path or address, of bytes their SHA-256; one with tools a fourth.
    """
    digest = hashlib.sha256()
    for record in records:
        images = [each if isinstance(each, str) else hashlib.sha256(each).hexdigest() for each in record.images]
        further = [images, list(record.tools)] if record.tools else [images] if images else []
        turns = [_turn_entry(message) for message in record.messages]
        line = json.dumps([turns, record.text, *further], ensure_ascii=False, separators=(",", ":"))
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _turn_entry(message: Message) -> list[Any]:
    """A turn in the line of its record."""
    calls = [[call.name, call.arguments, call.id] for call in message.calls]
    more = {"reasoning": message.reasoning, "calls": calls, "name": message.name, "call_id": message.call_id}
    held = {key: value for key, value in more.items() if value}
    return [message.role, message.content, *([held] if held else [])]


def _nothing_usable(name: str, skipped: list[Skipped]) -> CalibrationError:
    if not skipped:
        return CalibrationError(f"{name} holds no records", FORMATS_HELP)
    reasons = "; ".join(reason_lines(skipped))
    return CalibrationError(f"{name}: none of its {len(skipped)} records can be used: {reasons}", FORMATS_HELP)


def reason_lines(skipped: Iterable[Skipped]) -> list[str]:
    """The most frequent reasons: how many rows have each, the first of them, and its keys where they are not told."""
    groups: dict[str, list[Skipped]] = {}
    for row in skipped:
        groups.setdefault(row.reason, []).append(row)
    most = sorted(groups.values(), key=len, reverse=True)[:REASONS_SHOWN]
    return [f"{len(rows)} x {rows[0].reason}, first in record {rows[0].index}{_keys(rows[0])}" for rows in most]


def _keys(row: Skipped) -> str:
    return f" (keys: {row.keys})" if row.keys and "(keys: " not in row.reason else ""
