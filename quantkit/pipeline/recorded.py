"""Run a recipe and leave a record of it, whatever becomes of it."""

from __future__ import annotations

from typing import Any

from quantkit.errors import QuantkitError
from quantkit.gates import parse_gate
from quantkit.pipeline.run import run
from quantkit.pipeline.workers import HERE, Workers
from quantkit.recipe import Recipe
from quantkit.run_history.record import RunRecord, finished_record, now, stopped_record
from quantkit.run_history.store import History
from quantkit.system.progress import Observer


def recorded_run(
    recipe: Recipe, observer: Observer, *, installs: bool = True, workers: Workers = HERE
) -> dict[str, Any]:
    """Run a recipe and append its record; a history that cannot be written is a note, and the result stands.

    Args:
        recipe: what to run.
        observer: is told what happens.
        installs: make the environments of libraries that are not there.
        workers: who does what takes long.

    Returns:
        The content of ``report.json``.

    Raises:
        QuantkitError: nothing could run.
    """
    started = now()
    try:
        content = run(recipe, observer, installs=installs, workers=workers)
    except BaseException as error:
        append(recipe, stopped_record(recipe, error, "run", started), observer)
        raise
    append(recipe, finished_record(recipe, content, "run", started), observer)
    left = [gate for gate in recipe.gates if parse_gate(gate).kind == "accepted"]
    if left:
        observer.note(f"relative to the accepted run, which 'quantkit check' judges: {', '.join(left)}")
    return content


def append(recipe: Recipe, record: RunRecord, observer: Observer) -> int | None:
    """Add a record to the recipe's history, and return its number; None where it is off or cannot be written."""
    if not recipe.history.enabled:
        return None
    try:
        return History(recipe.history_file).append(record)
    except QuantkitError as error:
        observer.note(f"warning: this run is not in the history: {error}")
        return None
