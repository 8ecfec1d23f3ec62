"""What a record is: a conversation, with tools and images where it has some, or a plain text."""

from __future__ import annotations

from dataclasses import dataclass, field

ROLES = ("assistant", "developer", "system", "tool", "user")
IMAGE = "<image>"
"""Where an image stands in a text, as LLaVA and LLaMA-Factory write it."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool.

    Attributes:
        name: of the tool.
        arguments: as JSON.
        id: by which its result refers to it; may be empty.
    """

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of ``ROLES``.
        content: its text; may be empty beside calls or reasoning, and of what a tool returned.
        reasoning: what an assistant thought before it spoke.
        calls: of tools, by an assistant.
        name: of the tool that returned this.
        call_id: of the call that it answers.
    """

    role: str
    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    name: str = ""
    call_id: str = ""

    def is_empty(self) -> bool:
        """Whether nothing is said, thought or called."""
        return not (self.content.strip() or self.reasoning.strip() or self.calls)


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation or a plain text: exactly one of ``messages`` and ``text``.

    Attributes:
        messages: the turns.
        text: the text.
        images: what stands for each :data:`IMAGE` in them, in this order: a path, an address, or the bytes of a file.
            Where there are none, ``<image>`` is text like any other.
        tools: the descriptions of the tools of a conversation, each as JSON.
        changes: what of the row is not in the record, in words; no part of what a record is.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    images: tuple[str | bytes, ...] = ()
    tools: tuple[str, ...] = ()
    changes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.text is not None):
            raise ValueError("a record has either messages or a text")


class UnusableError(Exception):
    """A row is no record; ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def kind_of(value: object) -> str:
    """What a value is, for messages."""
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
