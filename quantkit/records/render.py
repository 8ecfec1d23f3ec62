"""Records to text, and text to tokens, as the model's chat template wants them.

Templates run as those of ``transformers`` do, in a process of their own, see :mod:`quantkit.records.sandbox`. The one
source of change, today's date, is replaced by a fixed date, so that a record gives the same tokens on every day.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CalibrationError
from quantkit.records.adapting import AS_TEXT, STEPS, adapted
from quantkit.records.record import IMAGE, Record
from quantkit.records.sandbox import TemplateEnded, TemplateFailure, render_chat
from quantkit.records.template_forms import forms
from quantkit.system.artifacts import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
SYSTEMS = ("system", "developer")
NONE = "none"
_CLOCK = {
    "%Y": "2024",
    "%y": "24",
    "%m": "07",
    "%B": "July",
    "%b": "Jul",
    "%-d": "26",
    "%d": "26",
    "%e": "26",
    "%j": "208",
    "%A": "Friday",
    "%a": "Fri",
    "%H": "00",
    "%I": "12",
    "%M": "00",
    "%S": "00",
    "%p": "AM",
}
"""26 July 2024, the date that the Llama 3 templates use where they have no clock."""


def template_text(chat_template: str | None, tokenizer: PreTrainedTokenizerBase, *, tools: bool = False) -> str | None:
    """The Jinja source that a recipe's choice stands for, or None where messages are joined plainly.

    Args:
        chat_template: ``auto`` for the tokenizer's where it has one, ``none`` or None for none, else a file.
        tokenizer: the model's.
        tools: of several templates that of conversations with tools, where there is one.

    Raises:
        CalibrationError: the file cannot be read, or the tokenizer has several templates and no default.
    """
    if chat_template in (None, NONE):
        return None
    if chat_template != AUTO:
        return _read(Path(str(chat_template)))
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template(tools=[{}] if tools else None))
    except ValueError as error:
        remedy = "give one as a file: 'chat_template: path/to/template.jinja'"
        raise CalibrationError(f"the model has several chat templates and no default: {error}", remedy) from error


def describe_template(chat_template: str | None, tokenizer: PreTrainedTokenizerBase) -> str | dict[str, str]:
    """Which template a choice stands for, as JSON data: ``model``, ``none``, or a file's name and SHA-256.

    Raises:
        CalibrationError: see :func:`template_text`.
    """
    if template_text(chat_template, tokenizer) is None:
        return "none"
    if chat_template == AUTO:
        return "model"
    path = Path(str(chat_template))
    return {"file": path.name, "sha256": file_sha256(path)}


class RefusedRecordError(CalibrationError):
    """A record that cannot be used with this model, though it is one: its template or its processor refuses it.

    Args:
        problem: with the record.
        remedy: what may be done.
        reason: the same without what tells the record, to be counted.
        ended: its template took more time or memory than there is.
    """

    def __init__(self, problem: str, remedy: str, reason: str, *, ended: bool = False) -> None:
        super().__init__(problem, remedy)
        self.reason = reason
        self.ended = ended


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a record, and what of the record had to be changed for it, in words."""

    text: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Encoded:
    """The token ids of a record, and what of the record had to be changed for them, in words."""

    ids: list[int]
    changes: tuple[str, ...] = ()


def render(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = AUTO,
    *,
    index: int | None = None,
    awaits_answer: bool = False,
) -> str:
    """The text of a record; see :func:`rendered`."""
    return rendered(record, tokenizer, chat_template, index=index, awaits_answer=awaits_answer).text


def rendered(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = AUTO,
    *,
    index: int | None = None,
    awaits_answer: bool = False,
    image_mark: str = IMAGE,
) -> Rendered:
    """The text of a record: a plain text as it is, a conversation through the template.

    Without a template the messages' contents are joined with a blank line between them. A conversation that the
    template refuses is given as :mod:`quantkit.records.adapting` changes it, and in the forms that templates differ in,
    see :mod:`quantkit.records.template_forms`.

    Args:
        record: what to render.
        tokenizer: the model's.
        chat_template: see :func:`template_text`.
        index: the record's, for messages.
        awaits_answer: end a conversation with what the template writes before an answer; without one, a blank line.
        image_mark: what the model's processor takes for an image of the record, where no template writes it.

    Raises:
        RefusedRecordError: the template refuses the record in every form, or is broken.
        CalibrationError: the template cannot be read.
    """
    if record.text is not None:
        return Rendered(_marked(record.text, record, image_mark))
    template = template_text(chat_template, tokenizer, tools=bool(record.tools))
    if template is None:
        messages, changes = STEPS[AS_TEXT](record.messages), record.changes
        contents = [_marked(message.content, record, image_mark) for message in messages]
        told = (AS_TEXT,) if list(record.messages) != messages else ()
        return Rendered("\n\n".join([*contents, *([""] if awaits_answer else [])]), (*changes, *told))
    variables = {**tokenizer.special_tokens_map, "add_generation_prompt": awaits_answer}
    try:
        found = _through(_with_fixed_clock(template), record, variables, image_mark)
    except TemplateFailure as error:
        where = "" if index is None else f" on record {index}"
        remedy = "mend the template, remove the record, or set 'chat_template: none'"
        reason, ended = f"the chat template refuses it: {error}", isinstance(error, TemplateEnded)
        raise RefusedRecordError(f"the chat template fails{where}: {error}", remedy, reason, ended=ended) from error
    return Rendered(found.text, tuple(dict.fromkeys((*record.changes, *found.changes))))


def _through(template: str, record: Record, variables: Mapping[str, Any], image_mark: str) -> Rendered:
    """What a template makes of a conversation: of the least change and in the first form that lose nothing of it.

    Where every form loses something, as a template may that leaves out what was thought, it is the first that is not
    refused. Changes are tried in vain for that alone, unless tools or a system turn are what it loses.

    Raises:
        TemplateFailure: it refuses all of them; what it says of the conversation as it is.
    """
    failure: TemplateFailure | None = None
    fallback: Rendered | None = None
    for messages, changes in adapted(record.messages):
        if fallback is not None and not _may_be_mended(record, fallback.text):
            break
        for form in forms(template, messages, record, partial(_marked, record=record, image_mark=image_mark)):
            try:
                text = render_chat(template, form.messages, {**variables, **form.variables})
            except TemplateEnded:
                raise
            except TemplateFailure as error:
                failure = failure or error
                continue
            found = Rendered(text, (*changes, *form.losses(text)))
            if form.shows(text, image_mark):
                return found
            fallback = found if fallback is None or record.images else fallback
    if fallback is None:
        raise failure or TemplateFailure("it writes nothing")
    return fallback


def _may_be_mended(record: Record, text: str) -> bool:
    """Whether what a rendered text loses may be in it after a change: calls of tools, results, or a system turn."""
    return any(
        message.calls or message.role == "tool" or (message.role in SYSTEMS and message.content.strip() not in text)
        for message in record.messages
    )


def _marked(text: str, record: Record, image_mark: str) -> str:
    return text.replace(IMAGE, image_mark) if record.images else text


def encode(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = AUTO,
    *,
    index: int | None = None,
    awaits_answer: bool = False,
) -> list[int]:
    """The token ids of a record; see :func:`encoded`."""
    return encoded(record, tokenizer, chat_template, index=index, awaits_answer=awaits_answer).ids


def encoded(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = AUTO,
    *,
    index: int | None = None,
    awaits_answer: bool = False,
) -> Encoded:
    """The token ids of a record, and what was changed for them; see :func:`rendered` for arguments and errors.

    A template writes its special tokens itself, so the tokenizer adds none; it adds its usual ones to a plain text that
    does not begin with them already.
    """
    templated = is_templated(record, tokenizer, chat_template)
    found = rendered(record, tokenizer, chat_template, index=index, awaits_answer=awaits_answer)
    begun = bool(tokenizer.bos_token) and found.text.startswith(str(tokenizer.bos_token))
    ids = tokenizer(
        found.text, add_special_tokens=not (templated or begun), return_attention_mask=False, verbose=False
    )["input_ids"]
    return Encoded([int(token) for token in ids], found.changes)


def is_templated(record: Record, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = AUTO) -> bool:
    """Whether a template renders a record; then it writes special tokens itself."""
    return record.text is None and template_text(chat_template, tokenizer) is not None


def _with_fixed_clock(template: str) -> str:
    """The template with a macro of its own in place of the clock that ``transformers`` gives it."""
    if "strftime_now" not in template:
        return template
    filters = "".join(f" | replace('{directive}', '{value}')" for directive, value in _CLOCK.items())
    return f"{{% macro strftime_now(pattern) +%}}{{{{ pattern{filters} }}}}{{%+ endmacro +%}}{template}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        remedy = "'chat_template' is auto, none, or the path of a Jinja file"
        raise CalibrationError(f"cannot read the chat template {path}: {error.strerror}", remedy) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"the chat template {path} is not UTF-8 text", "convert it to UTF-8") from error
