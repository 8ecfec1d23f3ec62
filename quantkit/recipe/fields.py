"""The base of all sections, the types of their keys, options beside keys, and patterns."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from quantkit.errors import SchemeError
from quantkit.system.names import chosen, spelled_device
from quantkit.system.validation import located

LONGEST_NAME = 80
LONGEST_NAME_BYTES = 180
"""Of a name as UTF-8: files have it with something before and behind, and 255 bytes at most."""


def _as_file_name(name: str) -> str:
    name = unicodedata.normalize("NFC", name)
    if len(name.encode()) > LONGEST_NAME_BYTES:
        raise ValueError(f"a name has at most {LONGEST_NAME_BYTES} bytes, as files are called by it")
    return name


Name = Annotated[
    str,
    Field(pattern=r"^[\p{L}\p{N}][\p{L}\p{M}\p{N}._-]*$", max_length=LONGEST_NAME),
    AfterValidator(_as_file_name),
]
"""A name of any script, which files and folders have too."""


def _at_home(path: str) -> str:
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"there is no home folder '{path.partition('/')[0]}'") from error


Place = Annotated[str, AfterValidator(_at_home)]
"""A path, or another name of what is meant; ``~`` is one's home."""
Title = Annotated[str, Field(min_length=1, max_length=200)]
"""What people read beside a name; any text on one line."""
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_choices_are_written(cls, given: Any, info: ValidationInfo) -> Any:
        """A choice of few words in any case, or in another word: ``BF16``, ``ppl``; one text where a list is meant."""
        field = str(info.field_name)
        if isinstance(given, str) and get_origin(cls.model_fields[field].annotation) is tuple:
            given = [given]
        words = _words_of(cls, field)
        if not words:
            return given
        if isinstance(given, list | tuple):
            return [_choice(each, words) for each in given]
        return _choice(given, words)


def _choice(given: Any, words: tuple[str, ...]) -> Any:
    return (chosen(given, words) or given) if isinstance(given, str) else given


@cache
def _words_of(section: type[BaseModel], field: str) -> tuple[str, ...]:
    """The words that a key, or each entry of its list, can be; none where it can be other text too."""
    return _literals(section.model_fields[field].annotation)


def _literals(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return tuple(word for word in get_args(annotation) if isinstance(word, str))
    return tuple(word for part in get_args(annotation) for word in _literals(part))


def named_after(text: str, otherwise: str) -> str:
    """A name made of a text, such as a file's: what no name can hold becomes ``-``.

    Args:
        text: of any script.
        otherwise: the name where nothing is left.
    """
    kept = [each if unicodedata.category(each)[0] in "LMN" or each in "._-" else "-" for each in text]
    name = "".join(kept).lstrip("._-")
    while name and unicodedata.category(name[0])[0] == "M":
        name = name[1:]
    while len(name) > LONGEST_NAME or len(name.encode()) > LONGEST_NAME_BYTES:
        name = name[:-1]
    return unicodedata.normalize("NFC", name) or otherwise


def require_distinct(names: list[str], what: str) -> None:
    """Raise ValueError if a name occurs twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two {what} are called '{twice[0]}': names must differ")


def options_apart(given: Mapping[Any, Any], names: Collection[str]) -> Mapping[Any, Any]:
    """A section as written, with the keys that are names of options under ``options``, after those given there."""
    options = {key: value for key, value in given.items() if key in names}
    rest = {key: value for key, value in given.items() if key not in names}
    apart = rest.get("options", {})
    return {**rest, "options": {**apart, **options}} if options and isinstance(apart, Mapping) else rest


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression from a recipe.

    Raises:
        SchemeError: it does not compile.
    """
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise SchemeError(f"'{pattern}' is not a regular expression: {error}") from error


def _spelled_device(given: Any) -> Any:
    return spelled_device(given) if isinstance(given, str) else given


def known_device(device: str) -> str:
    """A device by its name; ValueError where it is none."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"'{device}' is not a device: use auto, cpu, cuda or cuda:N")
    return device


Device = Annotated[str, BeforeValidator(_spelled_device), AfterValidator(known_device)]
"""The name of a device; whether it is there is known when it is asked for."""


def _all_compile(patterns: tuple[str, ...]) -> tuple[str, ...]:
    with located():
        for pattern in patterns:
            compiled(pattern)
    return patterns


Patterns = Annotated[tuple[str, ...], AfterValidator(_all_compile)]
"""Regular expressions."""
