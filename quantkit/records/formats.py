"""The record that a row is: a conversation, a question with its answer, a preference, or a plain text.

The format is recognized row by row, from the columns that are there and hold something, whatever their case: a
conversation first, then a question with its answer, then a text. Columns are told by what people call them, see
:mod:`quantkit.records.fields`, unless a recipe says which is which. The alpaca and ShareGPT layouts are those of
LLaMA-Factory's ``data/README.md``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantkit.records.fields import NAMES, Fields, listed, plain
from quantkit.records.parts import call_of, image_of, read_content
from quantkit.records.record import IMAGE, Call, Message, Record, UnusableError, kind_of
from quantkit.records.turns import Heard, checked_text, is_turn, json_of, read_turns, transcript

HOLDERS = ("body", "request", "input", "prompt", "data", "row", "record", "example", "messages", "conversation")
"""Columns that may hold a whole row."""
NOT_WANTED = "its answer is marked as not wanted"


def parse(
    row: object,
    columns: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    *,
    others: bool = True,
    prompts: bool = False,
) -> Record:
    """The record that a row holds.

    Args:
        row: a JSON object, a list of turns, or a plain text.
        columns: what a record has to columns of the data set, see :data:`quantkit.recipe.columns.MEANINGS`.
        tags: keys and roles of its turns, see :data:`quantkit.recipe.columns.TAGS`.
        others: beside ``columns`` the usual ones of the same format are read.
        prompts: any question needs no answer.

    Raises:
        UnusableError: the row is of no known format, has wrong types, or is empty.
    """
    if isinstance(row, str) and row.strip():
        return Record(text=checked_text(row, "text"))
    if isinstance(row, list) and row and all(is_turn(turn) for turn in row):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise UnusableError(f"not an object but {kind_of(row)}")
    lifted = _lifted({str(key): value for key, value in row.items()}, columns or {})
    fields, heard = Fields(lifted, columns or {}, others, prompts), Heard()
    record = _record(lifted, fields, heard, tags or {}, by_form=not columns)
    if _is_refused(fields["wanted"]) and record.text is None:
        raise UnusableError(f"{NOT_WANTED} ('{fields.column('wanted')}' is false)")
    images = heard.images or [image_of(each) for each in _as_list(fields["images"])]
    record = _with_images(record, images)
    if record.text is not None:
        return record
    tools = _tools(fields["tools"], heard)
    for text in (*tools, *(text for message in record.messages for call in message.calls for text in _texts(call))):
        checked_text(text, fields.column("tools") if text in tools else "tool_calls")
    return replace(record, tools=tools, changes=tuple(dict.fromkeys((*record.changes, *heard.changes))))


def _record(row: Mapping[str, Any], fields: Fields, heard: Heard, tags: Mapping[str, str], *, by_form: bool) -> Record:
    """The record of a row without its images and tools."""
    turns = [] if "messages" not in fields else _turns(fields, "messages", heard, tags)
    if "chosen" in fields and not (turns and turns[-1].role == "assistant"):
        return _conversation(fields, _preferred(fields, turns, heard, tags), heard)
    if turns:
        answer = _answer(fields, heard, tags) if "response" in fields and turns[-1].role != "assistant" else []
        return _conversation(fields, [*turns, *answer], heard)
    if fields.asks():
        return _conversation(fields, _asked_and_answered(fields, heard, tags), heard)
    found = _turns_by_their_form(row) if by_form else None
    if found is not None:
        return _conversation(fields, read_turns(found, json_of(row[found]), heard, tags), heard)
    if "text" in fields:
        return Record(text=_text(fields, "text"))
    if "response" in fields and not fields.is_blank("prompt"):
        raise UnusableError(f"'{fields.column('response')}' has no question beside it (keys: {listed(row)})")
    raise UnusableError(fields.why_not())


def _conversation(fields: Fields, turns: Sequence[Message], heard: Heard) -> Record:
    """A conversation with the system prompt, the history and the reasoning that stand beside it."""
    system = _plain_text(fields, "system")
    if system.strip() and turns[0].role not in ("system", "developer"):
        turns = [Message("system", checked_text(system, fields.column("system"))), *turns]
    reasoning = fields["reasoning"]
    if isinstance(reasoning, str) and turns[-1].role == "assistant" and not turns[-1].reasoning:
        turns = [*turns[:-1], replace(turns[-1], reasoning=checked_text(reasoning, fields.column("reasoning")))]
    return Record(messages=tuple(turns), changes=tuple(heard.changes))


def _asked_and_answered(fields: Fields, heard: Heard, tags: Mapping[str, str]) -> list[Message]:
    before = [] if "history" not in fields else _turns(fields, "history", heard, tags)
    asked = [*before, *_asked(fields, heard, tags)]
    if fields.is_blank("response") and "chosen" not in fields:
        raise UnusableError(fields.blank_reason("response"))
    return [*asked, *(_answer(fields, heard, tags) if "response" in fields else [])]


def _asked(fields: Fields, heard: Heard, tags: Mapping[str, str]) -> list[Message]:
    """The turns of a prompt, which may be a text, a conversation, or one in a text."""
    first, further = ("prompt", "query") if "prompt" in fields else ("query", None)
    if isinstance(_turns_or_text(fields[first]), list | Mapping):
        return _turns(fields, first, heard, tags)
    text = _text(fields, first)
    turns = [turn for turn in transcript(text) if not turn.is_empty()]
    if turns:
        return turns
    more = fields[further] if further else None
    if isinstance(more, list | Mapping):
        is_prose = isinstance(more, list) and _are_texts(more)
        more = "\n".join(more) if is_prose else json.dumps(more, ensure_ascii=False, default=str)
    if isinstance(more, str):
        text = f"{text}\n{checked_text(more, fields.column('query'))}"
    return [Message("user", text)]


def _answer(fields: Fields, heard: Heard, tags: Mapping[str, str], meaning: str = "response") -> list[Message]:
    """The turns of an answer: of several that are alternatives, the first."""
    column, given = fields.column(meaning), _turns_or_text(fields[meaning])
    if "tools" in fields and (calls := call_of(given if isinstance(given, str) else json.dumps(given, default=str))):
        return [Message("assistant", "", calls=calls)]
    if isinstance(given, Mapping) and not is_turn(given):
        given = _said_in(given)
    if isinstance(given, list) and given and not is_turn(given[0]):
        first = _said_in(given[0]) if isinstance(given[0], Mapping) else given[0]  # an alternative with its score
        given = (
            first
            if not isinstance(first, Mapping) or is_turn(first)
            else json.dumps(given, ensure_ascii=False, default=str)
        )
    if is_turn(given) or isinstance(given, list):
        return read_turns(column, given, heard, tags)
    if isinstance(given, bool | int | float):
        given = json.dumps(given)
    if isinstance(given, Mapping) and given:  # what is wanted is JSON
        given = json.dumps(given, ensure_ascii=False, default=str)
    if not isinstance(given, str):
        raise UnusableError(f"'{column}' holds {kind_of(given)} where text should be")
    return [Message("assistant", checked_text(given, column))]


def _said_in(given: Mapping[str, Any]) -> Any:
    """What an object around an answer says, such as what a server sends; the object where it is the answer."""
    choices = given.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        return choices[0].get("message", choices[0].get("text"))
    return next((given[key] for key in ("content", "text", "value", "response", "answer") if key in given), given)


def _turns_or_text(given: Any) -> Any:
    """A value; a text that is JSON is that where it holds turns or a server's answer, and else a text as any other."""
    found = json_of(given)
    if found is given or is_turn(found) or (isinstance(found, Mapping) and "choices" in found):
        return found
    return found if isinstance(found, list) and found and all(is_turn(each) for each in found) else given


def _preferred(fields: Fields, turns: Sequence[Message], heard: Heard, tags: Mapping[str, str]) -> list[Message]:
    """A conversation that ends with the answer that was preferred."""
    given = json_of(fields["chosen"])
    whole = transcript(given) if isinstance(given, str) else []
    if whole:
        return [turn for turn in whole if not turn.is_empty()]
    chosen = _answer(fields, heard, tags, "chosen")
    if chosen[0].role != "assistant":
        return chosen
    before = list(turns) or (_asked(fields, heard, tags) if "prompt" in fields or "query" in fields else [])
    if "history" in fields and not turns:
        before = [*_turns(fields, "history", heard, tags), *before]
    if not before:
        raise UnusableError(f"'{fields.column('chosen')}' has no question beside it")
    return [*before, *chosen]


def _turns(fields: Fields, meaning: str, heard: Heard, tags: Mapping[str, str]) -> list[Message]:
    return read_turns(fields.column(meaning), json_of(fields[meaning]), heard, tags)


def _turns_by_their_form(row: Mapping[str, Any]) -> str | None:
    """A column that holds turns, whatever it is called."""
    for column, value in row.items():
        given = json_of(value)
        if isinstance(given, list) and given and all(is_turn(turn) for turn in given):
            return column
        if plain(column) == "data" and isinstance(given, list) and len(given) > 1 and _are_texts(given):
            return column
    return None


def _lifted(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row, or with the columns of one that it holds in one of its own, as requests to a server do."""
    tree = row.get("prompt")
    if isinstance(tree, Mapping) and isinstance(tree.get("replies"), list):
        return {"messages": _first_thread(tree)}
    for key, value in row.items():
        inner = json_of(value) if plain(key) in HOLDERS and key not in columns.values() else None
        if isinstance(inner, Mapping) and any(plain(str(name)) in NAMES["messages"] for name in inner):
            rest = {name: held for name, held in row.items() if name != key}
            return {**rest, **{str(name): held for name, held in inner.items()}}
    return row


def _are_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _first_thread(tree: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The turns of a tree of replies, as OpenAssistant has them, always the first reply, which is ranked best."""
    turns: list[Mapping[str, Any]] = []
    turn: Any = tree
    while isinstance(turn, Mapping):
        turns.append({"role": turn.get("role"), "content": turn.get("text")})
        replies = turn.get("replies")
        turn = replies[0] if isinstance(replies, list) and replies else None
    return turns


def _is_refused(given: Any) -> bool:
    """Whether a column that says if an answer is wanted says no; of a table the word."""
    return given is False or (isinstance(given, str) and given.strip().lower() == "false")


def _tools(given: Any, heard: Heard) -> tuple[str, ...]:
    """The descriptions of tools, each as JSON in the form that templates know."""
    found = json_of(given)
    if found is None or found == []:
        return ()
    described = [json_of(each) for each in _as_list(found)]
    if not all(isinstance(each, Mapping) for each in described):
        heard.changes.append("tools that are no JSON left out")
        return ()
    wrapped = (each if "function" in each or "name" not in each else _as_function(each) for each in described)
    return tuple(json.dumps(each, ensure_ascii=False, default=str) for each in wrapped)


def _texts(call: Call) -> tuple[str, str, str]:
    return call.name, call.arguments, call.id


def _as_function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A description as OpenAI's chat requests have it."""
    schema = {"parameters": tool["input_schema"]} if "input_schema" in tool else {}
    kept = {key: value for key, value in tool.items() if key not in ("input_schema", "type")}
    return {"type": "function", "function": {**kept, **schema}}


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


def _text(fields: Fields, meaning: str) -> str:
    value, column = fields[meaning], fields.column(meaning)
    if not isinstance(value, str):
        raise UnusableError(f"'{column}' holds {kind_of(value)} where text should be")
    return checked_text(value, column)


def _plain_text(fields: Fields, meaning: str) -> str:
    """A text, or the texts of an object or a list that stands for one."""
    value = fields[meaning]
    return "" if value is None else read_content(fields.column(meaning), value, [], "system").text


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
