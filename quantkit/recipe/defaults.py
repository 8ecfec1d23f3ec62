"""The section ``defaults``: keys for every variant that takes them and does not give them itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import RecipeError, did_you_mean
from quantkit.recipe.library import taken_keys
from quantkit.recipe.options import DEFAULT_METHOD, option_names
from quantkit.recipe.variant import VariantSpec
from quantkit.schemes import DEFAULT_KIND, SCHEMES, scheme_keys
from quantkit.schemes.kinds import keys_of


def defaults_for(defaults: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that apply to a variant: not the options of another method or the keys of another scheme."""
    known = _keys_taken(defaults, variant)
    return {key: value for key, value in defaults.items() if key in known}


def check_default_keys(defaults: Mapping[Any, Any], variants: Sequence[Any]) -> None:
    """Refuse the defaults that no variant could take.

    Raises:
        RecipeError: with the nearest key that one could.
    """
    known = _scheme_free_keys()
    for variant in variants:
        if isinstance(variant, Mapping):
            known |= _keys_taken(defaults, variant)
    known -= {"name", "options", "library"}
    for key in defaults:
        if key in scheme_keys() and key not in known:
            kinds = ", ".join(kind for kind in SCHEMES.names() if key in keys_of(kind))
            raise RecipeError(f"defaults.{key}: no variant has a scheme that takes it", f"these do: {kinds}")
        if key not in known:
            raise RecipeError(f"unknown key 'defaults.{key}'", did_you_mean(str(key), known))


def _keys_taken(defaults: Mapping[str, Any], variant: Mapping[str, Any]) -> set[str]:
    """The keys that a variant as written takes; a library's method is its own affair, so no default gives it."""
    if "library" in variant:
        return taken_keys(variant["library"], variant.get("method")) - {"method"}
    choices = {"method": DEFAULT_METHOD, "scheme": DEFAULT_KIND, **defaults, **variant}
    return _scheme_free_keys() | _scheme_keys(choices["scheme"]) | option_names(choices["method"])


def _scheme_free_keys() -> set[str]:
    return set(VariantSpec.model_fields) - set(scheme_keys())


def _scheme_keys(kind: object) -> set[str]:
    """The keys of a kind of scheme; all of them for what is none, which the field's own validator reports."""
    return set(keys_of(kind) if isinstance(kind, str) and kind in SCHEMES else scheme_keys())
