"""Validation of the sections of a recipe, with each mistake on one line.

A validator may raise a :class:`QuantkitError` inside ``located()``, which gives it the path of its key and
keeps its remedy apart from what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from quantkit.errors import QuantkitError, RecipeError, did_you_mean
from quantkit.system.strict_yaml import line_of

S = TypeVar("S", bound=BaseModel)

_MISTAKE = "quantkit_mistake"
_UNKNOWN_KEY = "quantkit_unknown_key"
_LONGEST_INPUT = 60
_SEE = "docs/recipe.md tells what each key takes"
MARKS = ("[key]", "[VariantSpec]", "[AutoSpec]", "[LibrarySpec]", "[RecoverSpec]")
"""Parts of a location that no one wrote: pydantic's mark for a mapping's key, and the tags of sections in a union."""
_PLAIN = {
    "model_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "tuple_type": "must be a list",
    "string_type": "must be text",
    "string_pattern_mismatch": "must be letters, digits, '.', '_' and '-', and begin with a letter or a digit",
    "invalid_key": "a key must be text",
    "too_short": "must not be empty",
}
"""Plainer words for some of pydantic's messages, by type."""


def parse_section(section: type[S], given: Mapping[str, Any], origin: str, text: str | None = None) -> S:
    """Validate ``given`` as a section; each mistake becomes one line.

    Args:
        section: what it should be.
        given: keys and values.
        origin: names it in messages.
        text: the YAML that it was read from; messages then tell the line.

    Raises:
        RecipeError: with the path of the key, what is allowed, and the nearest match; further mistakes beside it.
    """
    try:
        return section.model_validate(dict(given))
    except ValidationError as error:
        found = [each for mistake in _told(error) for each in _located(mistake, section, origin, text)]
        raise RecipeError.together(list({str(each): each for each in found}.values())) from error
    except QuantkitError as error:
        raise RecipeError(f"{origin}: {error.problem}", error.remedy) from error


@contextmanager
def located() -> Iterator[None]:
    """Inside a validator: what quantkit raises on purpose becomes a mistake at the place of the validator."""
    try:
        yield
    except QuantkitError as error:
        others = [(other.problem, other.remedy) for other in error.others]
        facts = {"problem": error.problem, "remedy": error.remedy, "others": others}
        raise PydanticCustomError(_MISTAKE, "{problem}", facts) from error


def unknown_key(key: str, known: Iterable[str], remedy: str = "") -> PydanticCustomError:
    """The mistake of a key that the validated mapping does not have; the remedy lists those that it has."""
    return PydanticCustomError(
        _UNKNOWN_KEY, "unknown key '{key}'", {"key": key, "remedy": remedy or did_you_mean(key, known)}
    )


def _told(error: ValidationError) -> list[ErrorDetails]:
    """The mistakes that are told: not that a list is empty because its entries are mistaken."""
    found = error.errors()
    inner = {each["loc"][:depth] for each in found for depth in range(len(each["loc"]))}
    return [each for each in found if each["type"] != "too_short" or each["loc"] not in inner]


def _located(mistake: ErrorDetails, section: type[BaseModel], origin: str, text: str | None) -> Iterator[RecipeError]:
    """A mistake, and what was found with it, with its line where there is a text."""
    if text is not None:
        place = [part for part in mistake["loc"] if part not in MARKS]
        if mistake["type"] == _UNKNOWN_KEY:
            place.append(mistake["ctx"]["key"])
        line = line_of(text, place)
        origin = origin if line is None else f"{origin}:{line}"
    yield _as_recipe_error(mistake, section, origin)
    path = _dotted(mistake["loc"])
    for problem, remedy in mistake.get("ctx", {}).get("others", ()):
        yield RecipeError(f"{origin}: {path}: {problem}" if path else f"{origin}: {problem}", remedy)


def _as_recipe_error(first: ErrorDetails, section: type[BaseModel], origin: str) -> RecipeError:
    kind, location, context = first["type"], first["loc"], first.get("ctx", {})
    path = _dotted(location)
    where = f"{origin}: {path}: " if path else f"{origin}: "
    if kind == _UNKNOWN_KEY:
        return RecipeError(f"{origin}: unknown key '{_dotted((*location, context['key']))}'", context["remedy"])
    if kind == _MISTAKE:
        return RecipeError(f"{where}{context['problem']}", context["remedy"] or _SEE)
    if kind == "extra_forbidden":
        known = _keys_at(section, location[:-1])
        return RecipeError(f"{origin}: unknown key '{path}'", did_you_mean(str(location[-1]), known))
    if kind == "missing":
        return RecipeError(f"{origin}: key '{path}' is missing", _SEE)
    if kind == "literal_error" and isinstance(first["input"], str):
        allowed = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        return RecipeError(f"{where}'{first['input']}' is not allowed", did_you_mean(first["input"], allowed))
    if kind == "value_error":
        return RecipeError(f"{where}{first['msg'].removeprefix('Value error, ')}", _SEE)
    message = _PLAIN.get(kind, first["msg"].replace("Input should ", "must "))
    is_name = kind == "string_pattern_mismatch" and location[-1] == "name"
    remedy = "letters may be of any script; a 'title' beside the name takes any text" if is_name else _SEE
    if kind.startswith(("int_", "float_", "bool_")) and str(first["input"]).strip().lstrip("+-").isdigit():
        remedy = "write it without quotes"
    return RecipeError(f"{where}{message}, not {_shown(first['input'])}", remedy)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__} of many digits"
    return text if len(text) <= _LONGEST_INPUT else f"{text[:_LONGEST_INPUT]}..."


def _dotted(location: Iterable[int | str]) -> str:
    text = ""
    for part in location:
        if part not in MARKS:
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _keys_at(section: type[BaseModel], location: Iterable[int | str]) -> set[str]:
    """The keys allowed at a location of a recipe, for the remedy."""
    current, models = section, [section]
    for part in location:
        if part in MARKS:
            current = next((model for model in models if f"[{model.__name__}]" == part), current)
            continue
        field = None if isinstance(part, int) else current.model_fields.get(part)
        models = models if field is None else _models_in(field.annotation)
        current = models[0] if models and field is not None else current
    return set(current.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
