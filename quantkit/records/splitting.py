"""Two parts of a data set, one to calibrate on and one to score on, which share no record."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.errors import CalibrationError
from quantkit.records.dataset import RecordSet, records_sha256
from quantkit.records.record import Message, Record
from quantkit.system.artifacts import write_text

HELD_OUT = 0.2
"""Share of the records that is scored on."""
MOST = 4000
"""Records of a part at most: more than any run calibrates or scores on."""
PIECE = (400, 4000)
"""Characters of a piece of a long text, at least and at most."""
PIECES = 20
"""Into so many pieces at least a data set is cut that is a single long text, if they are long enough."""
ADDRESS = re.compile(r"(data|https?|file):", re.IGNORECASE)


def split(found: RecordSet) -> tuple[list[Record], list[Record]]:
    """The records to calibrate on, and those to score on: a fifth, drawn by the hash of their contents.

    Equal records count once, so that none is in both. Of a data set that has grown, most records are on the side where
    they were. A long plain text is cut into pieces first.

    Raises:
        CalibrationError: there are not two.
    """
    keyed = {records_sha256([piece]): piece for record in _pieces(found.records) for piece in record}
    drawn = [keyed[key] for key in sorted(keyed)]
    if len(drawn) < 2:
        raise CalibrationError(
            f"data set '{found.name}' has a single record, of which none can be held out to score on",
            "give more records, some dozens at least",
        )
    held = max(1, math.floor(HELD_OUT * len(drawn)))
    return drawn[held:][:MOST], drawn[:held][:MOST]


def write_records(file: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines that are read as the same records.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(file, "".join(json.dumps(row_of(record), ensure_ascii=False) + "\n" for record in records))


def row_of(record: Record) -> dict[str, Any]:
    """A record as a row: ``text`` or ``messages`` as OpenAI has them, with ``tools`` and ``images`` if it has some."""
    row: dict[str, Any] = {"text": record.text} if record.text is not None else {}
    if record.messages:
        row["messages"] = [_turn(message) for message in record.messages]
    if record.tools:
        row["tools"] = [json.loads(tool) for tool in record.tools]
    if record.images:
        row["images"] = [_image(image) for image in record.images]
    return row


def _turn(message: Message) -> dict[str, Any]:
    calls = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        | ({"id": call.id} if call.id else {})
        for call in message.calls
    ]
    more = {
        "reasoning_content": message.reasoning,
        "tool_calls": calls,
        "name": message.name,
        "tool_call_id": message.call_id,
    }
    return {"role": message.role, "content": message.content, **{key: value for key, value in more.items() if value}}


def _image(image: str | bytes) -> str:
    """A path from anywhere, an address, or the bytes of a file as one."""
    if isinstance(image, bytes):
        return f"data:application/octet-stream;base64,{base64.b64encode(image).decode()}"
    return image if ADDRESS.match(image) else str(Path(image).absolute())


def _pieces(records: list[Record]) -> Iterator[list[Record]]:
    """Each record by itself, a long plain text in pieces."""
    whole = sum(len(record.text or "") for record in records)
    length = max(PIECE[0], min(PIECE[1], whole // PIECES))
    for record in records:
        plain = record.text is not None and not record.images
        yield [replace(record, text=text) for text in _cut(record.text or "", length)] if plain else [record]


def _cut(text: str, length: int) -> Iterator[str]:
    """A text in pieces of at most ``length`` characters, cut where a paragraph, line, sentence or word ends."""
    while len(text) > length:
        ends = (text.rfind(mark, length // 2, length) + len(mark) for mark in ("\n\n", "\n", ". ", " "))
        end = next((end for end in ends if end > length // 2), length)
        piece, text = text[:end], text[end:]
        if piece.strip():
            yield piece
    if text.strip():
        yield text
