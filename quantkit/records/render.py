"""Records to text, and text to tokens, as the model's chat template wants them.

Templates run as those of ``transformers`` do, in a process of their own, see :mod:`quantkit.records.sandbox`. The one
source of change, today's date, is replaced by a fixed date, so that a record gives the same tokens on every day.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CalibrationError
from quantkit.records.formats import IMAGE, Record
from quantkit.records.sandbox import TemplateFailure, render_chat
from quantkit.system.artifacts import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
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


def template_text(chat_template: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The Jinja source that a recipe's choice stands for, or None where messages are joined plainly.

    Args:
        chat_template: ``auto`` for the tokenizer's where it has one, ``none`` or None for none, else a file.
        tokenizer: the model's.

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
        return str(tokenizer.get_chat_template())
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


def render(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None = AUTO,
    *,
    index: int | None = None,
    awaits_answer: bool = False,
    image_mark: str = IMAGE,
) -> str:
    """The text of a record: a plain text as it is, a conversation through the template.

    Without a template the messages' contents are joined with a blank line between them. Templates of models that see
    may want contents as lists of parts, and write nothing for a text: contents are given so where they are missing.

    Args:
        record: what to render.
        tokenizer: the model's.
        chat_template: see :func:`template_text`.
        index: the record's, for messages.
        awaits_answer: end a conversation with what the template writes before an answer; without one, a blank line.
        image_mark: what the model's processor takes for an image of the record, where no template writes it.

    Raises:
        CalibrationError: the template cannot be read, is broken, or refuses the record.
    """
    if record.text is not None:
        return _marked(record.text, record, image_mark)
    template = template_text(chat_template, tokenizer)
    contents = [_marked(message.content, record, image_mark) for message in record.messages]
    if template is None:
        return "\n\n".join([*contents, *([""] if awaits_answer else [])])
    variables = {**tokenizer.special_tokens_map, "add_generation_prompt": awaits_answer}
    try:
        return _through(_with_fixed_clock(template), record, contents, variables, image_mark)
    except TemplateFailure as error:
        where = "" if index is None else f" on record {index}"
        remedy = "mend the template, remove the record, or set 'chat_template: none'"
        raise CalibrationError(f"the chat template fails{where}: {error}", remedy) from error


def _through(
    template: str, record: Record, contents: Sequence[str], variables: Mapping[str, Any], image_mark: str
) -> str:
    """What a template makes of a conversation: of parts where there are images, or where it writes no texts.

    Raises:
        TemplateFailure: it fails on texts, and on parts if it knows them.
    """
    roles = [message.role for message in record.messages]
    texts = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    parts = [{"role": message.role, "content": _parts(message.content, record)} for message in record.messages]
    forms: list[Sequence[Mapping[str, Any]]] = [parts, texts] if record.images else [texts, parts]
    failure, found = None, list[str]()
    for messages in forms if "type" in template else [texts]:
        try:
            found.append(render_chat(template, messages, variables))
        except TemplateFailure as error:
            failure = failure or error
            continue
        if _shows(found[-1], record, image_mark):
            return found[-1]
    if failure is not None and not found:
        raise failure
    return found[0] if not record.images else found[-1]


def _parts(content: str, record: Record) -> list[dict[str, str]]:
    """A content as the parts that templates of models that see know."""
    texts = content.split(IMAGE) if record.images else [content]
    parts: list[dict[str, str]] = []
    for place, text in enumerate(texts):
        parts += [{"type": "image"}] if place else []
        parts += [{"type": "text", "text": text}] if text.strip() else []
    return parts


def _shows(text: str, record: Record, image_mark: str) -> bool:
    """Whether a rendered text has every content of its record, and a mark for every image."""
    contents = (message.content for message in record.messages)
    pieces = (piece.strip() for content in contents for piece in (content.split(IMAGE) if record.images else [content]))
    return all(piece in text for piece in pieces) and text.count(image_mark) >= len(record.images)


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
    """The token ids of a record; see :func:`render` for arguments and errors.

    A template writes its special tokens itself, so the tokenizer adds none; it adds its usual ones to a plain text.
    """
    templated = is_templated(record, tokenizer, chat_template)
    text = render(record, tokenizer, chat_template, index=index, awaits_answer=awaits_answer)
    encoded = tokenizer(text, add_special_tokens=not templated, return_attention_mask=False, verbose=False)
    return [int(token) for token in encoded["input_ids"]]


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
