"""Turns of a conversation, as the field writes them: who speaks, what is said, thought, shown and called.

Keys and roles are told by what people call them, without regard to case; ``tags`` of a recipe come first. A role that
nobody knows is the other side of one that is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from quantkit.records.parts import CALLED, RETURNED, THOUGHT, Said, call_of, calls_of, read_content, reasoning_of
from quantkit.records.record import Message, UnusableError, kind_of

SPOKEN_BY = {
    "user": ("user", "human", "prompter", "customer", "client", "person", "usr", "用户", "问"),
    "assistant": (
        "assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "llm", "agent", "answer", "response", "output",
        "claude", "bing", "bard", "gemini", "llama", "助手", "答",
    ),
    "system": ("system", "sys", "system_prompt", "system_message"),
    "developer": ("developer",),
    "tool": (
        "tool", "observation", "function", "function_response", "function_result", "function_output", "tool_response",
        "tool_result", "tool_output", "tools", "ipython", "environment", "api",
    ),
    "call": ("function_call", "tool_call", "action"),
}  # fmt: skip
"""Names of roles, by what they are; ``call`` is an assistant's call of a tool."""
ROLES_BY_NAME = {name: role for role, names in SPOKEN_BY.items() for name in names}
ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "call",
    "system_tag": "system",
}
ROLE_KEYS = ("role", "from", "speaker", "author", "sender", "type")
CONTENT_KEYS = ("content", "value", "text", "parts", "message", "utterance", "body", "data")
CALL_KEYS = ("tool_calls", "function_call", "tool_call", "function_calls")
ASKED = ("instruction", "input", "prompt", "question", "query", "user", "human", "q")
ANSWERED = ("output", "response", "answer", "completion", "assistant", "gpt", "bot", "a")
"""Keys of a turn that is a question with its answer."""
EMPTY_END = "an empty turn at its end left out"
LABEL = re.compile(
    r"^[ \t]*(?:#{1,4}[ \t]*|\*\*|\[)?(human|user|assistant|system|ai|bot|chatgpt|gpt|model|prompter|customer|agent"
    r"|function response|observation)(?:\*\*|\])?[ \t]*:(?:\*\*)?[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
"""Who speaks, at the beginning of a line of a conversation that is one text."""


@dataclass(slots=True)
class Heard:
    """What turns hold beside their texts.

    Attributes:
        images: of their parts, in their order.
        changes: what of them is left out, in words.
    """

    images: list[str | bytes] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)


def read_turns(column: str, given: Any, heard: Heard, tags: Mapping[str, str] | None = None) -> list[Message]:
    """The messages of a conversation.

    Args:
        column: in which it stands, for messages.
        given: a list of turns (mappings, pairs or texts), one turn, or a text in which lines begin with who speaks.
        heard: is told what the turns hold beside their texts.
        tags: see :data:`quantkit.recipe.columns.TAGS`.

    Raises:
        UnusableError: it holds no conversation.
    """
    turns = _listed(column, given)
    if turns and all(isinstance(turn, str) for turn in turns):
        messages = [_said(column, turn, "assistant" if place % 2 else "user") for place, turn in enumerate(turns)]
    elif turns and all(isinstance(turn, Sequence) for turn in turns):
        messages = _pairs(column, turns)
    else:
        messages = _of_mappings(column, turns, heard, dict(tags or {}))
    return _checked(column, messages, heard)


def transcript(text: str) -> list[Message]:
    """The messages of a text in which lines begin with who speaks; none where it is no such text."""
    found = list(LABEL.finditer(text))
    if not found or text[: found[0].start()].strip():
        return []
    ends = [*(match.start() for match in found[1:]), len(text)]
    roles = [ROLES_BY_NAME[_plain_name(match[1])] for match in found]
    if "user" not in roles or "assistant" not in roles:
        return []
    said = (text[match.end() : end].strip() for match, end in zip(found, ends, strict=True))
    return [Message(role, each) for role, each in zip(roles, said, strict=True)]


def is_turn(value: object) -> bool:
    """Whether a value says who speaks and what."""
    if not isinstance(value, Mapping):
        return False
    keys = {str(key).strip().lower() for key in value}
    return _role_given(value, {}) is not None and bool(keys & {*CONTENT_KEYS, *CALL_KEYS})


def checked_text(value: str, column: str) -> str:
    """A text that can be written as UTF-8.

    Raises:
        UnusableError: it cannot.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnusableError(f"'{column}' holds text that is not valid Unicode") from None
    return value


def _listed(column: str, given: Any) -> list[Any]:
    """The turns as a list."""
    if isinstance(given, str):
        turns = transcript(given)
        if not turns:
            raise UnusableError(f"'{column}' is not a list but a string")
        return [{"role": turn.role, "content": turn.content} for turn in turns]
    if isinstance(given, Mapping):
        return [given]
    if not isinstance(given, Sequence):
        raise UnusableError(f"'{column}' is not a list but {kind_of(given)}")
    nested = len(given) == 1 and isinstance(given[0], list) and all(isinstance(each, Mapping) for each in given[0])
    return list(given[0] if nested else given)


def _pairs(column: str, turns: Sequence[Any]) -> list[Message]:
    """Turns that are pairs of a question and an answer."""
    messages: list[Message] = []
    for turn in turns:
        if len(turn) != 2:
            raise UnusableError(f"'{column}' is not a list of pairs")
        messages += [_said(column, turn[0], "user"), _said(column, turn[1], "assistant")]
    return messages


def _said(column: str, given: object, role: str) -> Message:
    if not isinstance(given, str):
        raise UnusableError(f"'{column}' holds {kind_of(given)} where text should be")
    return Message(role, checked_text(given, column))


def _of_mappings(column: str, turns: Sequence[Any], heard: Heard, tags: Mapping[str, str]) -> list[Message]:
    roles = _roles_of(turns, tags)
    messages: list[Message] = []
    thought = ""
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise UnusableError(f"'{column}' holds {kind_of(turn)} where a message should be")
        plain = {str(key).strip(): value for key, value in turn.items()}
        found = _item(plain, heard) or _read_turn(column, plain, heard, tags, roles)
        if _only_thinks(plain, found):
            thought = "\n\n".join(filter(None, [thought, found[0].reasoning or found[0].content]))
            continue
        messages += _with_thought(found, checked_text(thought, column))
        thought = ""
    return [*messages, *_with_thought([], checked_text(thought, column))]


def _with_thought(messages: list[Message], thought: str) -> list[Message]:
    """Messages before which something was thought: by the first, if an assistant says it, else in a turn of its own."""
    if not thought:
        return messages
    if not messages or messages[0].role != "assistant":
        return [Message("assistant", "", reasoning=thought), *messages]
    reasoning = "\n\n".join(filter(None, [thought, messages[0].reasoning]))
    return [replace(messages[0], reasoning=reasoning), *messages[1:]]


def _item(turn: Mapping[str, Any], heard: Heard) -> list[Message]:
    """The message of a turn that is a part of another, told by its type and without a role; none for other turns."""
    kind = str(turn.get("type", "")).lower()
    if kind not in (*THOUGHT, *CALLED, *RETURNED) or any(key in turn for key in ("role", "from", "value")):
        return []
    said = read_content("content", [turn], heard.images, "assistant")
    if said.results:
        return [Message("tool", checked_text(text, "content"), call_id=call_id) for call_id, text in said.results]
    return [Message("assistant", "", reasoning=said.reasoning, calls=said.calls)]


def _only_thinks(turn: Mapping[str, Any], found: Sequence[Message]) -> bool:
    """Whether a turn has what was thought before the next one: an item of reasoning, or Harmony's channel for it."""
    if len(found) != 1 or found[0].role != "assistant" or found[0].calls:
        return False
    return turn.get("channel") == "analysis" or ("role" not in turn and str(turn.get("type", "")).lower() in THOUGHT)


def _read_turn(
    column: str, turn: Mapping[str, Any], heard: Heard, tags: Mapping[str, str], roles: Mapping[str, str]
) -> list[Message]:
    """The messages of one turn: several where it is a question with its answer, or holds results of tools."""
    given, key = _role_given(turn, tags), _key(turn, tags.get("content_tag"), CONTENT_KEYS)
    calls = calls_of(next((turn[name] for name in CALL_KEYS if turn.get(name)), None), column)
    if given is None or (key is None and not calls):
        pair = _pair(column, turn, heard)
        if pair:
            return pair
        keys = ", ".join(turn) or "none"
        raise UnusableError(
            f"'{column}' holds a message with neither role and content nor from and value (keys: {keys})"
        )
    role = roles.get(_plain_name(given))
    if role is None:
        raise UnusableError(f"'{column}' holds a message of unknown role '{given}'")
    said = read_content(column, None if key is None else turn[key], heard.images, role, others=bool(calls))
    heard.changes += [each for each in said.left_out if each not in heard.changes]
    return _as_messages(column, role, turn, said, calls)


def _as_messages(column: str, role: str, turn: Mapping[str, Any], said: Said, calls: tuple[Any, ...]) -> list[Message]:
    """The messages of a turn, of which all that it says is known."""
    calls = (*calls, *said.calls)
    if role == "call":
        found = call_of(said.text)
        calls, said, role = (*calls, *found), replace(said, text="" if found else said.text), "assistant"
    content = checked_text(said.text, column)
    results = [Message("tool", checked_text(text, column), call_id=call_id) for call_id, text in said.results]
    if role == "tool":
        name, call_id = (checked_text(str(turn.get(key) or ""), column) for key in ("name", "tool_call_id"))
        return results or [Message("tool", content, name=name, call_id=call_id)]
    reasoning = checked_text(said.reasoning or reasoning_of(turn), column) if role == "assistant" else ""
    own = Message(role, content, reasoning=reasoning, calls=calls if role == "assistant" else ())
    if results:
        return [*results, *([] if own.is_empty() else [own])]
    return [own]


def _pair(column: str, turn: Mapping[str, Any], heard: Heard) -> list[Message]:
    """A question and its answer that are one turn, with a system prompt where it has one; none for other turns."""
    lower = {key.lower(): value for key, value in turn.items()}
    asked = next((lower[key] for key in ASKED if isinstance(lower.get(key), str) and lower[key].strip()), None)
    answered = next((lower[key] for key in ANSWERED if isinstance(lower.get(key), str)), None)
    if asked is None or answered is None:
        return []
    system = lower.get("system")
    before = [Message("system", checked_text(system, column))] if isinstance(system, str) and system.strip() else []
    return [*before, _said(column, asked, "user"), _said(column, answered, "assistant")]


def _roles_of(turns: Sequence[Any], tags: Mapping[str, str]) -> dict[str, str]:
    """What each name of a role stands for in these turns."""
    named = {_plain_name(name): ROLE_TAGS[tag] for tag, name in tags.items() if tag in ROLE_TAGS}
    every = (_role_given(turn, tags) for turn in turns if isinstance(turn, Mapping))
    given = dict.fromkeys(_plain_name(name) for name in every if name is not None)
    found = {name: role for name in given if (role := named.get(name) or _known_role(name)) is not None}
    unknown = [name for name in given if name not in found]
    sides = {role for role in found.values() if role in ("user", "assistant")}
    if len(unknown) == 1 and len(sides) == 1:
        found[unknown[0]] = "assistant" if sides == {"user"} else "user"
    elif len(unknown) == 2 and not sides:
        found |= dict(zip(unknown, ("user", "assistant"), strict=True))
    return found


def _known_role(name: str) -> str | None:
    """The role of a name; of one with a version or a number, such as ``gpt-4``, that of its beginning."""
    return ROLES_BY_NAME.get(name) or ROLES_BY_NAME.get(re.split(r"[\W\d]", name)[0].rstrip("_"))


def _role_given(turn: Mapping[Any, Any], tags: Mapping[str, str]) -> str | None:
    key = _key(turn, tags.get("role_tag"), ROLE_KEYS)
    given = None if key is None else turn[key]
    if str(key).lower() == "type" and _known_role(_plain_name(str(given))) is None:
        return None  # the type of something else
    if isinstance(given, Mapping):  # an author with a role
        given = next((given[each] for each in ("role", "name") if isinstance(given.get(each), str)), None)
    return None if given is None else str(given)


def _key(turn: Mapping[Any, Any], tag: str | None, usual: Sequence[str]) -> str | None:
    """The first key that is there: the one that a tag names, else a usual one with a value, else one without."""
    if tag is not None:
        return tag if tag in turn else None
    keys = {str(key).lower(): key for key in turn}
    there = [keys[name] for name in usual if name in keys]
    return next((key for key in there if turn[key] is not None), there[0] if there else None)


@lru_cache(maxsize=4096)
def _plain_name(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _checked(column: str, messages: list[Message], heard: Heard) -> list[Message]:
    """The messages without empty system prompts, and without empty turns at the end.

    Raises:
        UnusableError: another one is empty, or none is left.
    """
    kept = [message for message in messages if message.role not in ("system", "developer") or not message.is_empty()]
    length = len(kept)
    while length > 1 and kept[length - 1].is_empty() and kept[length - 1].role != "tool":
        length -= 1
    if any(message.role not in ("system", "developer") for message in kept[:length]) and length < len(kept):
        kept = kept[:length]
        heard.changes.append(EMPTY_END)
    if not any(message.role not in ("system", "developer") for message in kept):
        raise UnusableError(f"'{column}' holds no message")
    if any(message.is_empty() and message.role != "tool" for message in kept):
        raise UnusableError(f"'{column}' is empty or has an empty message")
    return kept


def json_of(value: Any) -> Any:
    """A value that may be JSON in a text, as columns of tables hold what is no text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
