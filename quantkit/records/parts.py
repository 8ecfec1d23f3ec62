"""The content of a turn: a text, parts of several kinds, reasoning, and calls of tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantkit.records.record import IMAGE, Call, UnusableError, kind_of

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thoughts", "thought", "reasoning_details")
THOUGHT = ("thinking", "reasoning", "reasoning_content", "redacted_thinking")
CALLED = ("tool_use", "tool_call", "function_call", "functioncall")
RETURNED = ("tool_result", "tool_response", "function_response", "function_call_output")
"""Types of parts that are no text of the turn."""
WRAPPED = {
    "toolUse": "tool_use", "functionCall": "tool_use", "function_call": "tool_use", "toolResult": "tool_result",
    "functionResponse": "tool_result", "function_response": "tool_result", "reasoningText": "thinking",
    "reasoningContent": "thinking",
}  # fmt: skip
"""Keys of parts that hold what others name by their type, as Bedrock and Gemini write them."""
IMAGE_KEYS = ("image", "image_url", "url", "path", "source", "inline_data")


@dataclass(slots=True)
class Said:
    """What a content holds.

    Attributes:
        text: its texts, with a mark for each image.
        reasoning: of parts that think.
        calls: of parts that call tools.
        results: what tools returned, each with the call's id.
        left_out: what is not in it, in words.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    results: tuple[tuple[str, str], ...] = ()
    left_out: list[str] = field(default_factory=list)


def read_content(column: str, content: Any, images: list[str | bytes], role: str, *, others: bool = False) -> Said:
    """What a content holds.

    Args:
        column: for messages.
        content: a text, null, a list of parts, or an object with one of these.
        images: gets those of its parts.
        role: of the turn; what a tool returns, and the call of one, may be any JSON.
        others: the turn holds more than this content, such as calls.

    Raises:
        UnusableError: it holds something else, or nothing that can be read.
    """
    if content is None:
        return Said()
    if isinstance(content, str):
        return Said(content)
    if isinstance(content, Mapping):
        inner = next((content[key] for key in ("parts", "text", "content", "value") if key in content), None)
        if isinstance(inner, str | list):
            return read_content(column, inner, images, role, others=others)
    if isinstance(content, list) and all(isinstance(part, str | Mapping) for part in content):
        found = _of_parts(content, images)
        if (
            not found.text.strip()
            and found.left_out
            and role not in ("tool", "call")
            and not (found.reasoning or found.calls or found.results or others)
        ):
            raise UnusableError(found.left_out[0].removesuffix(" left out") + ", which is no text")
        if found.text or not found.left_out or role not in ("tool", "call"):
            return found
    if role in ("tool", "call"):
        return Said(json.dumps(content, ensure_ascii=False, default=str))
    raise UnusableError(f"'{column}' holds {kind_of(content)} where text should be")


def _of_parts(parts: Sequence[Any], images: list[str | bytes]) -> Said:
    said = Said()
    for part in parts:
        if isinstance(part, str):
            said.text += part
        else:
            _add_part(said, {key: value for key, value in part.items() if value is not None}, images)
    return said


def _add_part(said: Said, part: Mapping[str, Any], images: list[str | bytes]) -> None:
    for key, kind in WRAPPED.items():
        if isinstance(part.get(key), Mapping):
            _add_part(said, {**part[key], "type": kind}, images)
            return
    kind = str(part.get("type", "")).lower()
    if kind in THOUGHT:
        said.reasoning += reasoning_of(part, ("text", *THOUGHT, "summary", "content"))
    elif kind in CALLED:
        said.calls = (*said.calls, *calls_of(part, "content"))
    elif kind in RETURNED:
        inner = next((part[key] for key in ("content", "output", "response", "result") if key in part), "")
        found = read_content("content", inner, images, "tool")
        call_id = next((part[key] for key in ("tool_use_id", "call_id", "toolUseId", "id") if part.get(key)), "")
        said.results = (*said.results, (str(call_id), found.text))
    elif isinstance(part.get("text"), str) or isinstance(part.get("refusal"), str):
        said.text += part.get("text") or part["refusal"]
    elif "image" in kind or (not kind and any(key in part for key in ("image", "image_url"))):
        source = next((part[key] for key in IMAGE_KEYS if key in part), None)
        if source is not None:
            images.append(image_of(source))
        said.text += IMAGE
    else:
        said.left_out.append(f"a part of type '{kind}' left out" if kind else f"a part with the keys {sorted(part)}")


def image_of(value: Any) -> str | bytes:
    """What an image is given as: a path or address, the bytes of a file, or an object that holds one of them.

    Raises:
        UnusableError: it is something else.
    """
    if isinstance(value, Mapping):
        kind = value.get("media_type") or value.get("mime_type")
        if kind and isinstance(value.get("data"), str):
            return f"data:{kind};base64,{value['data']}"
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if not isinstance(value, str | bytes):
        raise UnusableError(f"an image is {kind_of(value)} where a path should be")
    return value


def reasoning_of(turn: Mapping[str, Any], keys: Sequence[str] = REASONING_KEYS) -> str:
    """What an assistant thought, where a turn, a row or a part has it in one of ``keys``, as a text or as parts."""
    found = next((turn[key] for key in keys if turn.get(key)), "")
    if isinstance(found, list):
        found = "".join(str(part.get("text") or "") if isinstance(part, Mapping) else str(part) for part in found)
    return found if isinstance(found, str) else ""


def calls_of(given: Any, column: str) -> tuple[Call, ...]:
    """The calls of tools that a key holds: a list of them or one, as objects or as JSON.

    Raises:
        UnusableError: one of them names no tool.
    """
    if isinstance(given, str):
        found = call_of(given)
        if not found and given.strip() not in ("", "[]", "null", "None"):
            raise UnusableError(f"'{column}' holds a call of a tool without a name")
        return found
    if not given:
        return ()
    found = _calls([given] if isinstance(given, Mapping) else given)
    if not found:
        raise UnusableError(f"'{column}' holds a call of a tool without a name")
    return found


def call_of(text: str) -> tuple[Call, ...]:
    """The calls that a text is, as JSON; none where it is anything else."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    return _calls(given if isinstance(given, list) else [given])


def _calls(given: Any) -> tuple[Call, ...]:
    """The calls in a list of objects; none where one of them is no call."""
    found = []
    for each in given if isinstance(given, Sequence) else ():
        inner = each.get("function", each) if isinstance(each, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
            return ()
        arguments: Any = next((inner[key] for key in ("arguments", "parameters", "input", "args") if key in inner), {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
        found.append(Call(inner["name"], text or "{}", str(each.get("id") or each.get("call_id") or "")))
    return tuple(found)
