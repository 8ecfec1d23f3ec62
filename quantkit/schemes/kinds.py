"""Schemes by the name that a recipe gives them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from quantkit.errors import SchemeError, did_you_mean
from quantkit.schemes.additive import AdditiveScheme
from quantkit.schemes.base import Scheme
from quantkit.schemes.blockfloat import Mxfp4Scheme, Nvfp4Scheme
from quantkit.schemes.codebook import Fp4Scheme, Nf4Scheme
from quantkit.schemes.floating import Fp8Scheme
from quantkit.schemes.ggml import Iq4NlScheme, Q2KScheme, Q3KScheme, Q4KScheme, Q5KScheme, Q6KScheme
from quantkit.schemes.ggml_mixture import (
    Q2KMixture,
    Q3KMMixture,
    Q4KMMixture,
    Q4KSMixture,
    Q5KMMixture,
    Q5KSMixture,
    Q6KMixture,
)
from quantkit.schemes.integer import IntScheme
from quantkit.schemes.plain import BFloat16Scheme, Float16Scheme

_FAMILIES: tuple[tuple[type[Scheme], ...], ...] = (
    (IntScheme, Nf4Scheme, Fp4Scheme, Fp8Scheme, Mxfp4Scheme, Nvfp4Scheme),
    (Q2KScheme, Q3KScheme, Q4KScheme, Q5KScheme, Q6KScheme, Iq4NlScheme),
    (Q2KMixture, Q3KMMixture, Q4KSMixture, Q4KMMixture, Q5KSMixture, Q5KMMixture, Q6KMixture),
    (BFloat16Scheme, Float16Scheme),
)
SCHEMES: dict[str, type[Scheme]] = {scheme.kind: scheme for family in _FAMILIES for scheme in family}
READ_ONLY: dict[str, type[Scheme]] = {AdditiveScheme.kind: AdditiveScheme}
"""Kinds that files may have and recipes cannot ask for, as nothing here chooses their codes."""
DEFAULT_KIND = IntScheme.kind


def keys_of(kind: str) -> tuple[str, ...]:
    """The keys that a kind of scheme takes."""
    return tuple(SCHEMES[kind].defaults())


SCHEME_KEYS: tuple[str, ...] = tuple(dict.fromkeys(key for kind in SCHEMES for key in keys_of(kind)))
"""Every key that some kind of scheme takes."""


def make_scheme(kind: str, keys: Mapping[str, Any]) -> Scheme:
    """A scheme of a kind.

    Raises:
        SchemeError: there is no such kind, it does not take one of the keys, or a value is not allowed.
    """
    if kind not in SCHEMES:
        raise SchemeError(f"unknown scheme '{kind}'", did_you_mean(kind, SCHEMES))
    known = keys_of(kind)
    for key in keys:
        if key not in known:
            takes = ", ".join(known) if known else "no keys: its blocks and scales are fixed"
            raise SchemeError(f"scheme {kind} does not take '{key}'", f"it takes {takes}")
    return SCHEMES[kind](**_checked(SCHEMES[kind], keys))


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
    for key, value in keys.items():
        try:
            _type_of(scheme, key).validate_python(value, strict=True)
        except ValidationError as error:
            wanted = str(error.errors()[0]["msg"])
            raise SchemeError(f"scheme {scheme.kind}: {key} is {value!r}", wanted[0].lower() + wanted[1:]) from error
    return keys


@cache
def _type_of(scheme: type[Scheme], key: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(scheme)[key])
