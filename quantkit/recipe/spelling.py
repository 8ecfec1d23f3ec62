"""A variant as people write it, in quantkit's own words: names in any case, and names of the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import RecipeError, SchemeError
from quantkit.formats import FORMATS
from quantkit.libraries import LIBRARIES
from quantkit.methods import METHODS
from quantkit.methods.tuning import TUNE
from quantkit.recipe.scheme_names import preset_named, scheme_named
from quantkit.schemes import SCHEMES, scheme_keys
from quantkit.system.registry import Registry
from quantkit.transforms import TRANSFORMS

PATCHES = ("first_blocks", "last_blocks", "embeddings")


def spelled(given: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """A variant, or the defaults of variants, with names as quantkit writes them.

    What a name of a scheme says of method and format gives way to what stands there, and what it says of the scheme
    must not differ from it. ``gptq+tune`` becomes ``gptq`` with ``tune: true``. Names that are not known stay, for the
    field's own validator to refuse.

    Raises:
        SchemeError: a name of a scheme, or of a method, says what another key denies.
    """
    found = dict(given)
    if isinstance(found.get("method"), str):
        found |= _with_method(method_spelled(found["method"]), found)
    if isinstance(found.get("format"), str):
        found["format"] = _spelled(FORMATS, found["format"])
    if isinstance(found.get("overrides"), Mapping):
        found["overrides"] = {pattern: patch_spelled(patch) for pattern, patch in found["overrides"].items()}
    for key in PATCHES:
        if key in found:
            found[key] = patch_spelled(found[key])
    if not isinstance(found.get("scheme"), str):
        return found
    return _with_scheme({**found, "scheme": preset_named(found["scheme"])})


def patch_spelled(patch: Any) -> Any:
    """A patch of a scheme in quantkit's own words; one that is a name alone is a scheme."""
    patch = {"scheme": patch} if isinstance(patch, str) else patch
    if not isinstance(patch, Mapping) or not isinstance(patch.get("scheme"), str):
        return patch
    return {key: value for key, value in _with_scheme(patch).items() if key in patch or key not in ("method", "format")}


def method_spelled(method: str) -> str:
    """A method, or a short form such as ``AWQ+GPTQ`` or ``gptq+tune``, as quantkit writes it."""
    parts = [part.strip() for part in method.split("+")]
    tuned = [TUNE] if len(parts) > 1 and parts[-1].lower() == TUNE else []
    *before, last = parts[: len(parts) - len(tuned)]
    return "+".join([*(_spelled(TRANSFORMS, name) for name in before), _spelled(METHODS, last), *tuned])


def _with_method(method: str, beside: Mapping[Any, Any]) -> dict[str, Any]:
    """The keys that a method as quantkit writes it stands for, in a variant with others beside it."""
    head, _, last = method.rpartition("+")
    if not head or last != TUNE or TUNE in head.split("+"):
        return {"method": method}
    if TUNE in beside and beside[TUNE] in (None, False):
        told = f"method '{method}' tunes, and {TUNE}: {_written(beside[TUNE] or False)} stands beside it"
        raise SchemeError(told, f"write method: {head}, or leave out {TUNE}")
    return {"method": head, TUNE: beside.get(TUNE, True)}


def _spelled(registry: Registry[Any], name: str) -> str:
    return registry.name_of(name) if name in registry else name


def _with_scheme(given: Mapping[Any, Any]) -> dict[Any, Any]:
    try:
        said = scheme_named(given["scheme"])
    except SchemeError:
        return dict(given)  # the validator of the key says why, with its place
    for key, value in said.items():
        there = given.get(key, value)
        if key in scheme_keys() and there != value and (there, value) != ("none", None):
            meant = f"scheme '{given['scheme']}' means {key}: {_written(value)}"
            raise SchemeError(f"{meant}, and {key}: {_written(there)} stands beside it", "leave out one of them")
    return {**said, **{key: value for key, value in given.items() if key != "scheme"}}


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def misplaced(name: str, part: str) -> str:
    """The remedy for a name that is not one of ``part`` and is one of another; empty where it is none at all."""
    if part == "method" and name.strip().lower() == TUNE:
        return f"it comes behind a method: write gptq+{TUNE}"
    others: dict[str, Registry[Any]] = {"method": METHODS, "library": LIBRARIES, "format": FORMATS, "scheme": SCHEMES}
    for key, registry in others.items():
        if key != part and name in registry:
            return f"it is a {key}: write {key}: {registry.name_of(name)}"
    if part == "scheme":
        return ""
    try:
        scheme_named(name)
    except SchemeError:
        return ""
    return f"it is a scheme: write scheme: {name}"


def entry_called(name: str, registry: Registry[Any]) -> str:
    """What a registry calls an entry that a variant names.

    Raises:
        QuantkitError: there is none; the remedy says what else the name is, or the nearest.
    """
    try:
        return registry.name_of(name)
    except RecipeError as error:
        raise RecipeError(error.problem, misplaced(name, registry.kind) or error.remedy) from error
