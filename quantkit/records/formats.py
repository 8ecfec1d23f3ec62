"""Formats of a row: Alpaca, chat messages, ShareGPT and plain text.

The format is recognized row by row from the keys that are there and not null: a conversation first, then
``instruction`` with ``output``, then ``text``. The alpaca and ShareGPT layouts are those of LLaMA-Factory's
``data/README.md``. Keys that no format knows are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.errors import CalibrationError, did_you_mean

ROLES = frozenset({"assistant", "developer", "function", "system", "tool", "user"})
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
CONVERSATION_KEYS = ("messages", "conversations")
IMAGE = "<image>"
"""Where an image stands in a text, as LLaVA and LLaMA-Factory write it."""
IMAGE_COLUMNS = ("images", "image")
COLUMN_ALIASES = {"prompt": "instruction", "query": "input", "response": "output"}
COLUMNS = frozenset({"instruction", "input", "output", "system", "history", "text", *CONVERSATION_KEYS, *IMAGE_COLUMNS})
_KEYS_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of ``ROLES``.
        content: its text.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation or a plain text: exactly one of ``messages`` and ``text``.

    Attributes:
        messages: the turns.
        text: the text.
        images: what stands for each :data:`IMAGE` in them, in this order: a path, an address, or the bytes of a file.
            Where there are none, ``<image>`` is text like any other.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    images: tuple[str | bytes, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.text is not None):
            raise ValueError("a record has either messages or a text")


class UnusableError(Exception):
    """A row is no record; ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Check a renaming: each key is a name that a format knows, each value a column of the data set.

    Raises:
        CalibrationError: a key is unknown.
    """
    for name in columns or {}:
        if name not in COLUMNS and name not in COLUMN_ALIASES:
            raise CalibrationError(f"unknown column name '{name}'", did_you_mean(name, COLUMNS | set(COLUMN_ALIASES)))


def parse(row: object, columns: Mapping[str, str] | None = None) -> Record:
    """The record that a row holds.

    Args:
        row: a JSON object.
        columns: names that a format knows (or LLaMA-Factory's ``prompt``, ``query``, ``response``) to columns of
            the data set; where given, other columns are not read.

    Raises:
        UnusableError: the row is of no known format, has wrong types, or is empty.
    """
    if not isinstance(row, Mapping):
        raise UnusableError(f"not an object but {_kind(row)}")
    fields = _renamed(row, columns)
    shown = _flatten(fields)
    record = _record(row, fields)
    return _with_images(record, shown or _images(fields))


def _record(row: Mapping[Any, Any], fields: Mapping[str, Any]) -> Record:
    """The record of a row without its images."""
    for key in CONVERSATION_KEYS:
        if key in fields:
            turns = _conversation(key, fields[key])
            return Record(messages=(*(() if turns[0].role == "system" else _system(fields)), *turns))
    if "instruction" in fields and "output" in fields:
        return Record(messages=_alpaca(fields))
    if "text" in fields:
        return Record(text=_text(fields, "text"))
    raise UnusableError(f"no known format (keys: {_listed(row)})")


def _flatten(fields: dict[str, Any]) -> list[str | bytes]:
    """Make texts of contents that are lists of parts; the images that these parts hold, in their order."""
    images: list[str | bytes] = []
    for key in CONVERSATION_KEYS:
        turns = fields.get(key)
        if isinstance(turns, list):
            fields[key] = [_flattened(turn, images) if isinstance(turn, Mapping) else turn for turn in turns]
    return images


def _flattened(turn: Mapping[Any, Any], images: list[str | bytes]) -> Mapping[Any, Any]:
    key = "value" if "value" in turn else "content"
    if not isinstance(turn.get(key), list):
        return turn
    return {**turn, key: "".join(_part(part, images) for part in turn[key])}


def _part(part: Any, images: list[str | bytes]) -> str:
    """The text of a part of a content, an image's being its mark."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind not in ("image", "image_url"):
        held = f"a part of type '{kind}'" if kind else _kind(part)
        raise UnusableError(f"a message holds {held}, which is no text")
    source = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key) is not None), None)
    if source is not None:
        images.append(_image(source))
    return IMAGE


def _images(fields: Mapping[str, Any]) -> list[str | bytes]:
    """The images that a row's own column holds."""
    found: Any = next((fields[key] for key in IMAGE_COLUMNS if fields.get(key)), [])
    return [_image(each) for each in (found if isinstance(found, list) else [found])]


def _image(value: Any) -> str | bytes:
    """What an image is given as: a path or address, the bytes of a file, or a mapping that holds one of them."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if not isinstance(value, str | bytes):
        raise UnusableError(f"an image is {_kind(value)} where a path should be")
    return value


def _with_images(record: Record, images: Sequence[str | bytes]) -> Record:
    """A record and its images, which stand first where no mark says where.

    Raises:
        UnusableError: there are marks, and not as many as images.
    """
    if not images:
        return record
    texts = [message.content for message in record.messages] if record.text is None else [record.text]
    marks = sum(text.count(IMAGE) for text in texts)
    if marks not in (0, len(images)):
        raise UnusableError(f"holds {len(images)} images and {marks} times '{IMAGE}'")
    before = "" if marks else f"{IMAGE}\n" * len(images)
    if record.text is not None:
        return replace(record, text=before + record.text, images=tuple(images))
    first = next((place for place, message in enumerate(record.messages) if message.role == "user"), 0)
    messages = list(record.messages)
    messages[first] = replace(messages[first], content=before + messages[first].content)
    return replace(record, messages=tuple(messages), images=tuple(images))


def _renamed(row: Mapping[Any, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    if columns is None:
        return {key: value for key, value in row.items() if value is not None}
    return {
        COLUMN_ALIASES.get(name, name): row[column] for name, column in columns.items() if row.get(column) is not None
    }


def _alpaca(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    request = _text(fields, "instruction")
    extra = _text(fields, "input", may_be_blank=True)
    if extra.strip():
        request = f"{request}\n{extra}"
    answer = _text(fields, "output")
    return (*_system(fields), *_history(fields), Message("user", request), Message("assistant", answer))


def _system(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    content = _text(fields, "system", may_be_blank=True)
    return (Message("system", content),) if content.strip() else ()


def _history(fields: Mapping[str, Any]) -> list[Message]:
    turns = fields.get("history", [])
    if not isinstance(turns, list):
        raise UnusableError(f"'history' is not a list but {_kind(turns)}")
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise UnusableError("'history' is not a list of pairs")
        messages += [Message("user", _checked(turn[0], "history")), Message("assistant", _checked(turn[1], "history"))]
    return messages


def _conversation(key: str, turns: Any) -> list[Message]:
    if not isinstance(turns, list):
        raise UnusableError(f"'{key}' is not a list but {_kind(turns)}")
    messages = [message for turn in turns for message in _turn(key, turn)]
    if not any(message.role != "system" for message in messages):
        raise UnusableError(f"'{key}' holds no message")
    return messages


def _turn(key: str, turn: Any) -> list[Message]:
    if not isinstance(turn, Mapping):
        raise UnusableError(f"'{key}' holds {_kind(turn)} where a message should be")
    if "from" in turn and "value" in turn:
        given, content, known = turn["from"], turn["value"], SHAREGPT_ROLES
    elif "role" in turn and "content" in turn:
        given, content, known = turn["role"], turn["content"], {role: role for role in ROLES}
    else:
        raise UnusableError(f"'{key}' holds a message with neither role and content nor from and value")
    if not isinstance(given, str) or given not in known:
        raise UnusableError(f"'{key}' holds a message of unknown role '{given}'")
    if known[given] == "system" and isinstance(content, str) and not content.strip():
        return []
    return [Message(known[given], _checked(content, key))]


def _text(fields: Mapping[str, Any], key: str, may_be_blank: bool = False) -> str:
    return _checked(fields.get(key, ""), key, may_be_blank)


def _checked(value: object, key: str, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise UnusableError(f"'{key}' holds {_kind(value)} where text should be")
    if not value.strip() and not may_be_blank:
        raise UnusableError(
            f"'{key}' is empty or has an empty message" if key in CONVERSATION_KEYS else f"'{key}' is empty"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnusableError(f"'{key}' holds text that is not valid Unicode") from None
    return value


def _kind(value: object) -> str:
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _listed(row: Mapping[Any, Any]) -> str:
    keys = [str(key) for key in row]
    more = f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else ""
    return ", ".join(keys[:_KEYS_SHOWN]) + more if keys else "none"
