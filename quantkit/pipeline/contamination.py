"""What a model was calibrated on, so that it is not asked the same."""

from __future__ import annotations

from quantkit import records
from quantkit.calibration import CalibrationSet
from quantkit.evaluation.answers import asked
from quantkit.recipe import Recipe


def seen_questions(recipe: Recipe, calibrated: CalibrationSet | None) -> tuple[str, ...]:
    """The questions in the records that are in the calibration set, where the recipe asks for answers.

    Raises:
        CalibrationError: the data set cannot be read.
    """
    if calibrated is None or recipe.evaluation.answers is None:
        return ()
    found = records.load(recipe.calibration.dataset)
    by_index = dict(zip(found.indices(), found.records, strict=True))
    used = (by_index[index] for index in calibrated.audit["records"]["used_indices"])
    return tuple(sorted({question for record in used for question in asked(record)}))
