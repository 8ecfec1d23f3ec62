"""Schemes by the name that a recipe gives them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, get_type_hints

from quantkit.errors import SchemeError
from quantkit.schemes.additive import AdditiveScheme
from quantkit.schemes.base import Scheme
from quantkit.system.registry import Registry

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SCHEMES: Registry[Scheme] = Registry(
    "scheme", "quantkit.schemes", "quantkit.schemes", named_by="kind", unknown=SchemeError, without=("base", "grids")
)
"""Every kind of scheme that a recipe can ask for."""
READ_ONLY: dict[str, type[Scheme]] = {AdditiveScheme.kind: AdditiveScheme}
"""Kinds that files may have and recipes cannot ask for, as nothing here chooses their codes."""
DEFAULT_KIND = "int"


def all_kinds() -> list[str]:
    """The name of every kind, the default first and then by the alphabet."""
    return sorted(SCHEMES.names(), key=lambda kind: (kind != DEFAULT_KIND, kind))


def keys_of(kind: str) -> tuple[str, ...]:
    """The keys that a kind of scheme takes."""
    return tuple(SCHEMES.get(kind).defaults())


def scheme_keys() -> tuple[str, ...]:
    """Every key that some kind of scheme takes, those of the default kind first."""
    return tuple(dict.fromkeys(key for kind in all_kinds() for key in keys_of(kind)))


def key_types(key: str) -> tuple[Any, ...]:
    """The types that the kinds which take a key declare for it, each once."""
    found = [get_type_hints(SCHEMES.get(kind))[key] for kind in SCHEMES.names() if key in keys_of(kind)]
    return tuple(dict.fromkeys(found))


def make_scheme(kind: str, keys: Mapping[str, Any]) -> Scheme:
    """A scheme of a kind.

    Raises:
        SchemeError: there is no such kind, it does not take one of the keys, or a value is not allowed.
    """
    scheme = SCHEMES.get(kind)
    known = keys_of(kind)
    for key in keys:
        if key not in known:
            takes = ", ".join(known) if known else "no keys: its blocks and scales are fixed"
            raise SchemeError(f"scheme {kind} does not take '{key}'", f"it takes {takes}")
    return scheme(**_checked(scheme, keys))


def scheme_from_json(data: Mapping[str, Any]) -> Scheme:
    """The inverse of :meth:`quantkit.schemes.base.Scheme.to_json`.

    Raises:
        SchemeError: the data does not describe a scheme.
    """
    rest = dict(data)
    kind = str(rest.pop("kind", ""))
    if kind in READ_ONLY and rest.keys() <= READ_ONLY[kind].defaults().keys():
        return READ_ONLY[kind](**_checked(READ_ONLY[kind], rest))
    return make_scheme(kind, rest)


def _checked(scheme: type[Scheme], keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys, each of the type that the scheme declares."""
    from pydantic import ValidationError  # libraries ask for schemes in environments that may lack it

    for key, value in keys.items():
        try:
            _type_of(scheme, key).validate_python(value, strict=True)
        except ValidationError as error:
            wanted = str(error.errors()[0]["msg"])
            raise SchemeError(f"scheme {scheme.kind}: {key} is {value!r}", wanted[0].lower() + wanted[1:]) from error
    return keys


@cache
def _type_of(scheme: type[Scheme], key: str) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(get_type_hints(scheme)[key])
