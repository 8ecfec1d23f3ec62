"""Keys of a recipe as they are written on the command line: columns, adapters with weights, further settings."""

from __future__ import annotations

from typing import Any


def columns_of(given: list[str]) -> dict[str, str]:
    """The columns of ``--column``.

    Raises:
        RecipeError: one is not of the form NAME=COLUMN.
    """
    from quantkit.errors import RecipeError

    wrong = next((text for text in given if not text.partition("=")[2]), None)
    if wrong is not None:
        raise RecipeError(f"--column {wrong} is not NAME=COLUMN", "write --column prompt=question, for one")
    return {name: column for name, _, column in (text.partition("=") for text in given)}


def weighted(given: str, option: str) -> dict[str, Any]:
    """An adapter and its weight from ``SOURCE`` or ``SOURCE=WEIGHT``.

    Raises:
        RecipeError: the weight is no number.
    """
    from quantkit.errors import RecipeError

    source, equals, weight = given.rpartition("=")
    try:
        return {"source": source, "weight": float(weight)} if equals else {"source": given}
    except ValueError as error:
        raise RecipeError(f"{option} {given}: '{weight}' is no weight", f"write {option} ./adapter=0.5") from error


def settings_of(given: list[str]) -> dict[str, Any]:
    """Keys and values of ``--set``, the values as YAML reads them; ``tune.steps=16`` is ``tune: {steps: 16}``.

    Raises:
        RecipeError: one is not of the form KEY=VALUE, or no key of a variant; a key is given whole and in parts.
    """
    from quantkit.errors import RecipeError
    from quantkit.system.strict_yaml import parse_mapping

    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        outer, _, inner = key.partition(".")
        if not equals or not all(part.isidentifier() for part in key.split(".", 1)):
            raise RecipeError(f"--set {text} is not KEY=VALUE", "write --set double_quant=false, for one")
        if key in ("model", "out", "calibration", "observer", "target", "adapter"):
            raise RecipeError(f"--set {text}: '{key}' is not a key of a variant", "docs/recipe.md lists them")
        read = parse_mapping(f"{inner or outer}: {value}", f"--set {text}")
        if not inner:
            found |= read
        elif isinstance(found.setdefault(outer, {}), dict):
            found[outer] |= read
        else:
            raise RecipeError(
                f"--set {text}: '{outer}' is given as a whole too", f"write --set {outer}.KEY=VALUE alone"
            )
    return found


def several(given: str | None) -> str | int | list[str] | None:
    """Devices as ``--devices`` gives them: ``all``, how many, or their names with commas between them."""
    if given is None or given.strip() == "all":
        return given and "all"
    return int(given) if given.strip().isdigit() else [each.strip() for each in given.split(",")]
