"""What a variant leaves unsaid: the method, format, scheme and keys that go with what it says.

A scheme that one method alone chooses implies that method, and so does an option of the method of those who brought the
scheme; schemes, methods and formats declare what they usually go
with (``usual``). Nothing that a recipe says is changed. Where nothing suits what it says, the variant stays as it is
written, and its own checks tell why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from quantkit.errors import QuantkitError, SchemeError
from quantkit.formats import FORMATS
from quantkit.methods import METHODS
from quantkit.recipe.steps import DEFAULT_METHOD, is_method, steps_of
from quantkit.schemes import DEFAULT_KIND, SCHEMES, make_scheme, scheme_keys

DEFAULT_FORMAT = "compressed-tensors"
FIRST_FORMATS = (DEFAULT_FORMAT, "bitsandbytes", "float", "gguf")
"""The order in which a format is looked for; all others follow by name."""
NAMES = ("method", "format", "scheme")


def implied(given: Mapping[Any, Any]) -> dict[Any, Any]:
    """A variant as written, with what it implies.

    Args:
        given: its keys, whose values need not be valid; names and keys of the scheme that are None are not given.
    """
    of_scheme = scheme_keys()
    said = {key: value for key, value in given.items() if value is not None or key not in (*NAMES, *of_scheme)}
    names = {name: said[name] for name in NAMES if name in said}
    if not _are_known(names):
        return said
    keys = {key: said[key] for key in of_scheme if key in said}
    for candidate in _candidates(names):
        if all(candidate.get(name, value) == value for name, value in names.items()):
            told = _told_by_kind(candidate["scheme"], keys) if "scheme" not in names else set()
            left = {key: value for key, value in said.items() if key not in told}
            found = _completed({**candidate, **names}, {key: left[key] for key in keys if key in left}, set(left))
            if found is not None:
                return found | left
    return said


def keys_beside(store: str, kind: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a scheme, and those that it usually has in a format.

    Args:
        store: name of the format.
        kind: of the scheme.
        keys: those that are given.
    """
    for usual in FORMATS.get(store).usual:
        found = {**_keys(usual), **keys}
        if usual.get("scheme", DEFAULT_KIND) == kind and _go_together(None, store, kind, found):
            return found
    return dict(keys)


def check_pair(method: str, store: str) -> None:
    """Refuse a method and a format that go together with no scheme.

    Raises:
        SchemeError: with what goes with either; or the format is only read.
    """
    if FORMATS.get(store).read_only:
        FORMATS.get(store).check(make_scheme(DEFAULT_KIND, {}))
    if _have_scheme(method, store):
        return
    methods = [name for name in METHODS.names() if _have_scheme(name, store)]
    stores = [name for name in FORMATS.names() if _have_scheme(method, name)]
    raise SchemeError(
        f"method {method} and format {store} do not go together",
        f"{method} goes with {', '.join(stores)}; {store} goes with {', '.join(methods)}",
    )


def _are_known(names: Mapping[str, Any]) -> bool:
    """Whether there are such methods, formats and schemes; if not, their own validators say so."""
    method, store, kind = (names.get(name) for name in NAMES)
    known = (method is None or is_method(method), store is None or store in FORMATS, kind is None or kind in SCHEMES)
    return all(known)


def _candidates(names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What may go with the names that are given, the likeliest first."""
    if "method" in names:
        yield from (dict(usual) for usual in steps_of(names["method"]).method.usual)
    for store in _formats(names):
        yield from ({"scheme": DEFAULT_KIND, **usual, "format": store} for usual in FORMATS.get(store).usual)
        if "scheme" in names:
            yield {"format": store, "scheme": names["scheme"]}
    if "format" in names:
        yield from _examples(names["format"])


def _formats(names: Mapping[str, str]) -> list[str]:
    """The formats to try: the one that is given; else the default, and others for a kind of scheme or a method."""
    if "format" in names:
        return [names["format"]]
    if names.get("scheme", DEFAULT_KIND) == DEFAULT_KIND and "method" not in names:
        return [DEFAULT_FORMAT]
    return [*FIRST_FORMATS, *(name for name in FORMATS.names() if name not in FIRST_FORMATS)]


def _examples(store: str) -> Iterator[dict[str, Any]]:
    for example in FORMATS.get(store).examples:
        if "overrides" not in example:
            yield {"scheme": DEFAULT_KIND, **example, "format": store}


def _completed(candidate: Mapping[str, Any], given: Mapping[str, Any], said: Set[Any]) -> dict[str, Any] | None:
    """A candidate with the keys that were given, its method, and what goes with its scheme; None if it fails.

    Args:
        candidate: names, and keys of its scheme.
        given: keys of the scheme that the variant gives.
        said: all its keys.
    """
    kind, store = candidate["scheme"], candidate["format"]
    scheme = SCHEMES.get(kind)
    method = candidate.get("method", scheme.quantizer or _told_by_options(scheme.authors_method, said))
    keys = {**_keys(candidate), **given}
    if not _go_together(method, store, kind, keys):
        return None
    return {"method": method, "format": store, "scheme": kind, **keys, **scheme.usual}


def _told_by_options(method: str | None, said: Set[Any]) -> str:
    """A method of which an option is given that the default method does not take; else that one."""
    taken = {name: set(steps_of(name).Options.model_fields) for name in (method, DEFAULT_METHOD) if name is not None}
    own = taken[method] - taken[DEFAULT_METHOD] if method is not None else set()
    return method if method is not None and own & said else DEFAULT_METHOD


def _keys(candidate: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of its scheme."""
    return {key: value for key, value in candidate.items() if key not in NAMES}


def _told_by_kind(kind: str, keys: Mapping[str, Any]) -> set[str]:
    """The width, where a kind of scheme has that and takes no key for it."""
    scheme = SCHEMES.get(kind)
    return {"bits"} if "bits" not in scheme.defaults() and keys.get("bits") == scheme().bits else set()


def _have_scheme(method: str, store: str) -> bool:
    """Whether a method and a format go together with one of the schemes that the format usually has."""
    return any(
        _go_together(method, store, usual.get("scheme", DEFAULT_KIND), _keys(usual))
        for usual in (*FORMATS.get(store).usual, *_examples(store))
    )


def _go_together(method: str | None, store: str, kind: str, keys: Mapping[str, Any]) -> bool:
    """Whether there is a scheme with these keys, whose codes the method chooses and the format stores."""
    try:
        scheme = make_scheme(kind, {key: None if value == "none" else value for key, value in keys.items()})
        FORMATS.get(store).check(scheme)
        if method is not None:
            steps_of(method).check(scheme)
    except QuantkitError:
        return False
    return True
