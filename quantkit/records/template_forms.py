"""The forms in which chat templates want what a conversation holds: texts or parts, calls as objects or as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from quantkit.records.record import IMAGE, Message, Record

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""What templates call what an assistant thought; those that know none may know the tags of ``THOUGHT``."""
THOUGHT = "<think>\n{reasoning}\n</think>\n\n"
TOOLS_LOST = "descriptions of its tools left out: the chat template writes none"
REASONING_LOST = "reasoning left out: the chat template writes none there"
ID_LENGTH = 9
"""Characters of the id of a call, letters and digits, in Mistral's templates."""

Mark = Callable[[str], str]
"""What a text is written as for a model that sees."""


@dataclass(frozen=True, slots=True)
class Form:
    """A conversation as a template is given it.

    Attributes:
        messages: mappings with ``role`` and ``content``, and what else a message has.
        variables: ``tools``, where there are any.
        pieces: what a text must have to lose nothing: contents and names of called tools.
        images: how many there are.
        tools: names of the described tools.
        reasoning: what was thought.
    """

    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    pieces: list[str]
    images: int
    tools: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)

    def shows(self, text: str, image_mark: str) -> bool:
        """Whether a rendered text has every content and call, as it is or as JSON, and a mark for every image."""
        return all(_is_in(piece, text) for piece in self.pieces) and text.count(image_mark) >= self.images

    def losses(self, text: str) -> tuple[str, ...]:
        """What a rendered text does not have that templates may leave out, in words."""
        lost = {
            TOOLS_LOST: any(name not in text for name in self.tools),
            REASONING_LOST: any(not _is_in(each.strip(), text) for each in self.reasoning),
        }
        return tuple(words for words, holds in lost.items() if holds)


def forms(template: str, messages: Sequence[Message], record: Record, mark: Mark) -> Iterator[Form]:
    """The forms of a conversation, the usual one first; only those in which it differs. Last are those without tools.

    Args:
        template: Jinja source.
        messages: the conversation, which may be changed from the record's.
        record: with images and tools.
        mark: of images in texts.
    """
    knows_parts = "type" in template
    contents = (True, False) if record.images and knows_parts else (False, True) if knows_parts else (False,)
    calls = any(message.calls for message in messages)
    blank = any(not message.content for message in messages)
    arguments = (False, True) if calls else (False,)
    none_first = re.search(r"content['\"]?\]?\s+is\s+(not\s+)?none", template) is not None
    nothing: tuple[str | None, ...] = ((None, "") if none_first else ("", None)) if blank else ("",)
    thinks = (True, False) if any(message.reasoning for message in messages) else (True,)
    short = (False, True) if calls else (False,)
    tools = [json.loads(tool) for tool in record.tools]
    described: tuple[bool, ...] = (True, False) if tools else (False,)
    names = [name for tool in tools if isinstance(name := _tool_name(tool), str)]
    kinds = product(described, thinks, short, nothing, arguments, contents)
    for with_tools, thought, short_ids, none, as_text, part in kinds:
        write = _Writer(template, record, mark, part, as_text, none, short_ids, thought)
        yield Form(
            write.messages(messages),
            {"tools": tools} if with_tools else {},
            _pieces(messages, record),
            len(record.images),
            names,
            [message.reasoning for message in messages if message.reasoning],
        )


@dataclass(frozen=True, slots=True)
class _Writer:
    """One form.

    Attributes:
        template: Jinja source.
        record: with images, where it has some.
        mark: of images in texts.
        parts: contents are lists of parts.
        as_text: arguments of calls are JSON in a text, not objects.
        nothing: the content of a turn that has none.
        short_ids: ids of calls are numbered, in nine characters.
        thinks: reasoning is given.
    """

    template: str
    record: Record
    mark: Mark
    parts: bool
    as_text: bool
    nothing: str | None
    short_ids: bool
    thinks: bool

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        ids = self._ids(messages)
        return [self._message(message, ids) for message in messages]

    def _ids(self, messages: Sequence[Message]) -> dict[str, str]:
        if not self.short_ids:
            return {}
        given = [call.id for message in messages for call in message.calls]
        return {name: f"call{place:0{ID_LENGTH - 4}d}" for place, name in enumerate(dict.fromkeys(given))}

    def _message(self, message: Message, ids: Mapping[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = {"role": message.role, "content": self._content(message)}
        if message.calls:
            found["tool_calls"] = [
                {
                    "id": ids.get(call.id, call.id),
                    "type": "function",
                    "function": {"name": call.name, "arguments": self._arguments(call.arguments)},
                }
                for call in message.calls
            ]
        if message.role == "tool":
            call_id = ids.get(message.call_id, next(iter(ids.values()), message.call_id))
            found |= {key: held for key, held in (("name", message.name), ("tool_call_id", call_id)) if held}
        if message.reasoning and self.thinks:
            found |= dict.fromkeys(self._reasoning_fields(), message.reasoning)
        return found

    def _reasoning_fields(self) -> list[str]:
        return [name for name in REASONING_FIELDS if re.search(rf"[.'\"]{name}\b", self.template)]

    def _content(self, message: Message) -> Any:
        content = message.content
        if message.reasoning and self.thinks and not self._reasoning_fields() and "<think>" in self.template:
            content = THOUGHT.format(reasoning=message.reasoning.strip()) + content
        if not content:
            return self.nothing
        return _parts(content, self.record) if self.parts else self.mark(content)

    def _arguments(self, arguments: str) -> Any:
        if self.as_text:
            return arguments
        try:
            return json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments


def _parts(content: str, record: Record) -> list[dict[str, str]]:
    """A content as the parts that templates of models that see know."""
    texts = content.split(IMAGE) if record.images else [content]
    parts: list[dict[str, str]] = []
    for place, text in enumerate(texts):
        parts += [{"type": "image"}] if place else []
        parts += [{"type": "text", "text": text}] if text.strip() else []
    return parts


def _pieces(messages: Sequence[Message], record: Record) -> list[str]:
    contents = (message.content for message in messages)
    texts = [piece.strip() for each in contents for piece in (each.split(IMAGE) if record.images else [each])]
    return [*texts, *(call.name for message in messages for call in message.calls)]


def _is_in(piece: str, text: str) -> bool:
    return piece in text or json.dumps(piece, ensure_ascii=False)[1:-1] in text


def _tool_name(tool: Any) -> Any:
    inner = tool.get("function", tool) if isinstance(tool, dict) else {}
    return inner.get("name") if isinstance(inner, dict) else None
