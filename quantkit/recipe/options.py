"""The options of a method and of what its name brings along, which stand beside a variant's own keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from quantkit.methods import METHODS
from quantkit.recipe.steps import is_method, steps_of
from quantkit.system.validation import unknown_key

DEFAULT_METHOD = "gptq"


def gathered(given: Mapping[Any, Any], own: Collection[str]) -> Mapping[Any, Any]:
    """A variant with the options of its method under ``options``.

    Args:
        given: the variant as it was written.
        own: the keys of a variant itself, which come before options of the same name.

    Raises:
        PydanticCustomError: neither the variant nor its method has a key.
    """
    method = given.get("method", DEFAULT_METHOD)
    if isinstance(method, str) and is_method(method):
        _check_keys(given, method, own)
    known = option_names(method) - set(own)
    options = {key: given[key] for key in given if key in known}
    rest = {key: value for key, value in given.items() if key not in known}
    apart = rest.get("options", {})
    return {**rest, "options": {**apart, **options}} if options and isinstance(apart, Mapping) else rest


def option_names(method: object) -> set[str]:
    """The options of a method; none for what is not a method, which the field's own validator reports."""
    if not isinstance(method, str) or not is_method(method):
        return set()
    return set(steps_of(method).Options.model_fields)


def _check_keys(given: Mapping[Any, Any], method: str, own: Collection[str]) -> None:
    known = set(own) | option_names(method)
    for key in given:
        if isinstance(key, str) and key not in known:
            owners = [name for name in METHODS.names() if key in option_names(name)]
            foreign = f"it is an option of {', '.join(owners)}, and the method is {method}" if owners else ""
            raise unknown_key(key, known, foreign)
