"""The keys of a scheme as a recipe gives them: some are given, the rest is the scheme's own."""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, create_model, field_validator, model_validator

from quantkit.recipe.fields import Flag, Section, Whole
from quantkit.recipe.scheme_names import scheme_named
from quantkit.schemes import Scheme, scheme_keys
from quantkit.schemes.kinds import key_types
from quantkit.system.validation import located

KEYS = scheme_keys()
"""Every key that some scheme takes."""
STRICT: dict[Any, Any] = {int: Whole, bool: Flag}
"""A recipe's numbers and booleans are not taken from text."""


def _written_type(key: str) -> Any:
    """The type of a key as a recipe writes it, where what may be None is written ``none``."""
    parts: list[Any] = []
    for declared in key_types(key):
        options = get_args(declared) if NoneType in get_args(declared) else (declared,)
        if NoneType in options:
            parts.append(Literal["none"])
        parts += [STRICT.get(option, option) for option in options if option is not NoneType]
    literals = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
    rest = [part for part in parts if get_origin(part) is not Literal]
    merged = [Literal[tuple(literals)]] if literals else []
    return Union[tuple(dict.fromkeys([*rest, *merged, None]))]  # noqa: UP007 - built from a list


if TYPE_CHECKING:

    class _Keys(Section):
        """One field for each key that some scheme takes."""

        def __getattr__(self, key: str) -> Any:
            """The value of a key; None where it was not given."""

else:
    _Keys = create_model("_Keys", __base__=Section, **{key: (_written_type(key), None) for key in KEYS})


class SchemeKeys(_Keys):
    """The keys of all schemes, as their dataclasses declare them; None was not given and is left to the scheme."""

    def given(self) -> dict[str, Any]:
        """The keys that were given, as :func:`quantkit.schemes.make_scheme` takes them."""
        found = {key: getattr(self, key) for key in KEYS if getattr(self, key) is not None}
        return {key: None if value == "none" else value for key, value in found.items()}


class SchemePatch(SchemeKeys):
    """The keys that some layers have otherwise.

    Attributes:
        scheme: another kind of scheme, which begins from its own defaults; None keeps the variant's.
    """

    scheme: str | None = None

    @field_validator("scheme")
    @classmethod
    def _scheme_exists(cls, kind: str | None) -> str | None:
        return kind if kind is None else known_kind(kind)


class BlocksPatch(SchemePatch):
    """The keys that the first or the last decoder blocks have otherwise.

    Attributes:
        count: how many blocks.
    """

    count: Annotated[Whole, Field(ge=1)]

    @model_validator(mode="after")
    def _changes_something(self) -> BlocksPatch:
        if self.scheme is None and not self.given():
            raise ValueError("gives no key beside count: add one of the scheme, such as bits: 8")
        return self


def known_kind(kind: str) -> str:
    """``kind``, where there is such a scheme; for use inside a validator."""
    with located():
        return str(scheme_named(kind)["scheme"])


def written_keys(scheme: Scheme) -> dict[str, Any]:
    """A scheme as a recipe writes it: ``scheme`` and every key that it takes."""
    keys = scheme.to_json()
    kind = keys.pop("kind")
    return {"scheme": kind} | {key: "none" if value is None else value for key, value in keys.items()}
