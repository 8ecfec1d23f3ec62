"""The recipe of one checkpoint that is asked for without a recipe: what `quantkit quantize` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError
from quantkit.recipe.document import Recipe
from quantkit.recipe.mixing import AutoSpec, spec_class
from quantkit.recipe.model import ModelSpec
from quantkit.recipe.outputs import ReportSpec
from quantkit.recipe.quantization import CalibrationSpec, QuantizationSpec
from quantkit.recipe.targets import variant_for
from quantkit.schemes import PlainScheme
from quantkit.system.validation import parse_section

NAME = "variant"
"""Of the only variant."""


def single_recipe(
    model: Mapping[str, Any],
    variant: Mapping[str, Any],
    *,
    calibration: str | Path | Mapping[str, Any] | CalibrationSpec | None = None,
    device: str = "auto",
    devices: str | int | Sequence[str] | None = None,
    target: str | None = None,
    folder: str | Path = "quantize",
) -> tuple[Recipe, tuple[str, ...]]:
    """A recipe of one variant, and what is to be said of it before it is made.

    Args:
        model: keys of a recipe's section.
        variant: keys of a variant; None is not given.
        calibration: a data set, or the keys of a recipe's section.
        device: on which it is quantized.
        devices: over which its walk is dealt, see :class:`quantkit.recipe.QuantizationSpec`.
        target: who will load the checkpoint, where that is said instead of a format.
        folder: of whatever a plan has to write.

    Raises:
        RecipeError: with what is wrong and the remedy.
    """
    given = {"name": NAME, **variant}
    if target is None:
        made, remark = parse_section(spec_class(given), given, "quantize"), ""
        if isinstance(made, AutoSpec) and made.front:
            raise RecipeError("quantize: one checkpoint is made to one budget", "give one, or write a recipe")
    else:
        made, remark = variant_for(target, given)
    plain = made.base_scheme()
    if model.get("dtype", "auto") == "auto" and isinstance(plain, PlainScheme) and plain.dtype:
        model = {**model, "dtype": "own"}  # every value is rounded once, to the scheme's dtype
    recipe = Recipe(
        name="quantize",
        model=parse_section(ModelSpec, model, "model"),
        calibration=_calibration(calibration),
        variants=(made,),
        quantization=parse_section(QuantizationSpec, {"device": device, "devices": devices}, "quantize"),
        report=ReportSpec(folder=str(folder)),
    )
    said = {**variant, **({} if target is None else {"format": made.format})}
    warnings = (f"warning: {warning}" for warning in made.warnings())
    return recipe, tuple(line for line in (remark, *made.implied_by(said), *warnings) if line)


def _calibration(given: str | Path | Mapping[str, Any] | CalibrationSpec | None) -> CalibrationSpec:
    if isinstance(given, CalibrationSpec):
        return given
    if given is None:
        return CalibrationSpec()
    keys = given if isinstance(given, Mapping) else {"dataset": str(given)}
    return parse_section(CalibrationSpec, keys, "calibration")
