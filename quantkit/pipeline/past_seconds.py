"""What stages took in earlier runs of the history: of the same model, on the same machine, by the same settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError
from quantkit.pipeline.titles import BASELINE_TITLE, evaluation_title, library_title, recover_title, walk_title
from quantkit.pipeline.work_seconds import END, START
from quantkit.recipe import LibrarySpec, Recipe, RecoverSpec
from quantkit.run_history.record import RunRecord, private
from quantkit.run_history.store import History, Wanted
from quantkit.system.artifacts import fingerprint
from quantkit.system.environment import describe

if TYPE_CHECKING:
    from quantkit.source import SourceModel


def past_seconds(recipe: Recipe, model: SourceModel) -> dict[str, tuple[int, float]]:
    """By stage the number of the newest run like this one and the seconds that it took there."""
    try:
        runs = History(recipe.history_file).runs(Wanted()) if recipe.history_file.exists() else []
    except QuantkitError:
        return {}  # what cannot be read tells nothing here; who needs it is told
    machine, given = describe(), private(recipe.resolved())
    source = fingerprint(model.made_from())
    here = (str(machine["cpu"] or ""), machine["cores"], machine["device"], source)
    found: dict[str, tuple[int, float]] = {}
    for run in runs:
        if (run.cpu, run.cores, run.device, run.source_fingerprint) == here and run.id is not None:
            found |= {stage: (run.id, seconds) for stage, seconds in _stages(recipe, run, given)}
    return found


def _stages(recipe: Recipe, run: RunRecord, given: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The stages of a recipe that a run did by the same settings, with their seconds."""
    alike = {key: run.recipe.get(key) == given[key] for key in ("evaluation", "calibration", "quantization")}
    then = {each.get("name"): each for each in run.recipe.get("variants", ())}
    now = {each["name"]: each for each in given["variants"]}
    if alike["evaluation"] and run.baseline is not None:
        yield from _seconds(BASELINE_TITLE, run.baseline.figures.get(("seconds", "", "evaluate")), START + END)
    shared = recipe.calibration.inputs == "float"
    for variant in recipe.variants:
        record = run.variant(variant.name)
        if record is None or then.get(variant.name) != now.get(variant.name):
            continue
        if alike["evaluation"]:
            seconds = record.figures.get(("seconds", "", "evaluate"))
            yield from _seconds(evaluation_title(variant.name), seconds, START + END)
        apart = isinstance(variant, LibrarySpec | RecoverSpec) or (variant.calibrated and not shared)
        alone = apart or len(recipe.variants) == 1
        if alone and alike["calibration"] and alike["quantization"]:
            title = (
                library_title(variant)
                if isinstance(variant, LibrarySpec)
                else recover_title(variant)
                if isinstance(variant, RecoverSpec)
                else walk_title([variant])
            )
            yield from _seconds(title, record.figures.get(("seconds", "", "quantize")))


def _seconds(stage: str, seconds: float | None, around: float = 0.0) -> Iterator[tuple[str, float]]:
    """A stage and its seconds, those of the process around what was timed with them."""
    if seconds:
        yield stage, seconds + around
