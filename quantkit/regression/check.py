"""A check: run a recipe, judge the run beside the accepted one, record it, and clean up."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from quantkit.errors import EXIT_USER_ERROR, QuantkitError, RecipeError
from quantkit.evaluation.job import LOGPROBS
from quantkit.gates.results import GateResult, Outcome
from quantkit.pipeline.recorded import append
from quantkit.recipe import Recipe
from quantkit.regression.changes import changes
from quantkit.regression.differences import RUNS_SHOWN, drifts, layer_shifts, metrics, text_shifts, trends
from quantkit.regression.document import (
    SCHEMA,
    Check,
    Reference,
    VariantState,
    write_check,
)
from quantkit.regression.judging import Beside, judge, notes, summary, verdict
from quantkit.regression.notify import tell
from quantkit.regression.pages import write_pages
from quantkit.regression.retention import checkpoint_of, clean_up, keep, keep_reports
from quantkit.run_history.record import RunRecord, finished_record, now, place, stopped_record
from quantkit.run_history.store import Accepted, History, Wanted
from quantkit.system.locks import held
from quantkit.system.progress import Observer

EXIT_CODES: dict[Outcome, int] = {"passed": 0, "regressed": 1, "unknown": EXIT_USER_ERROR}


def check(recipe: Recipe, observer: Observer, *, installs: bool = True) -> Check:
    """Run a recipe and judge it beside the accepted run.

    Checkpoints are reused where nothing that they are made from has changed; every file is scored anew, on the
    packages and the machine as they are today. One check or run at a time works in the recipe's folder.

    Args:
        recipe: what to do; it has gates.
        observer: is told what happens.
        installs: environments of libraries that are not there may be made.

    Raises:
        RecipeError: the recipe has no gates, or keeps no history.
        OutputError: another process is at work in the recipe's folder.
        QuantkitError: nothing could run, or the history cannot be read.
    """
    if not recipe.gates:
        raise RecipeError(
            f"recipe {recipe.name} has no gates, so that there is nothing to check", "add 'perplexity +1 %' for one"
        )
    if not recipe.history.enabled:
        raise RecipeError("a check needs the history, and history.enabled is false", "set it to true")
    history = History(recipe.history_file)
    with held(recipe.folder, f"check {recipe.name}", inside=True):
        history.check()
        started = now()
        content = _run(recipe, observer, started, installs)
        observer.stage("judge")
        record = finished_record(recipe, content, "check", started)
        references = history.references(recipe.name)
        beside = _beside(history, references, record)
        results = judge(recipe.gates, record, beside)
        outcome = verdict(results, record)
        record = replace(record, verdict=outcome)
        record = replace(record, id=append(recipe, record, observer))
        found = _document(recipe, record, beside, references, results, outcome)
        return tell(recipe, _kept(recipe, found, history, observer), observer)


def _run(recipe: Recipe, observer: Observer, started: str, installs: bool) -> dict[str, Any]:
    from quantkit.pipeline.context import Run
    from quantkit.pipeline.run import check_folders, run_holding

    current = Run(recipe, recipe.folder, observer, anew=True, installs=installs)
    try:
        check_folders(current)
        return run_holding(current)
    except BaseException as error:
        append(recipe, stopped_record(recipe, error, "check", started), observer)
        raise


def _beside(history: History, references: dict[str, Accepted], record: RunRecord) -> Beside:
    """The accepted runs of the variants, whole, and the runs before this one."""
    wanted = {name: found.run for name, found in references.items() if record.variant(name) is not None}
    runs = {number: history.run(number) for number in set(wanted.values())}
    earlier = history.runs(Wanted(name=record.name, last=RUNS_SHOWN)) if history.file.exists() else []
    return Beside({name: runs[number] for name, number in wanted.items()}, earlier)


def _document(
    recipe: Recipe,
    record: RunRecord,
    beside: Beside,
    references: dict[str, Accepted],
    results: list[GateResult],
    outcome: Outcome,
) -> Check:
    began, ended = datetime.fromisoformat(record.started), datetime.fromisoformat(record.finished)
    return Check(
        schema=SCHEMA,
        name=recipe.name,
        run=record.id,
        started=record.started,
        seconds=(ended - began).total_seconds(),
        quantkit=record.quantkit,
        device=next((variant.device for variant in record.variants if variant.device), record.device),
        verdict=outcome,
        exit_code=EXIT_CODES[outcome],
        summary=summary(outcome, results, record),
        variants=tuple(_state(recipe, record, variant.name) for variant in record.variants),
        references=tuple(
            _reference(recipe.folder, name, run, references[name].moment) for name, run in beside.references.items()
        ),
        gates=tuple(results),
        metrics=tuple(metrics(record, beside)),
        changes=tuple(changes(record, beside)),
        layers=tuple(layer_shifts(record, beside)),
        texts=tuple(text_shifts(record, beside)),
        trends=tuple(trends(record, beside)),
        drifts=tuple(drifts(record, beside)),
        notes=tuple(notes(results, record, beside, recipe)),
    )


def _state(recipe: Recipe, record: RunRecord, name: str) -> VariantState:
    variant = record.variant(name)
    if variant is None:
        raise ValueError(f"the run has no variant {name}")
    done = variant.status == "ok"
    folder = place(recipe.folder / "variants" / name) if done else None
    return VariantState(name, variant.status, variant.error, variant.scheme, folder)


def _reference(folder: Path, variant: str, run: RunRecord, accepted: str) -> Reference:
    kept = checkpoint_of(folder, run.id or 0, run.started, variant)
    return Reference(variant, run.id or 0, run.started, accepted, run.quantkit, None if kept is None else place(kept))


def _kept(recipe: Recipe, found: Check, history: History, observer: Observer) -> Check:
    """Write ``check.json``, keep the run's files and remove those of runs that nobody needs.

    A check that could not be recorded is not clean, whatever it found: the next one could not be compared with it.
    """
    folder = recipe.folder
    if found.run is None:
        told = f"the run could not be recorded in {place(recipe.history_file)}"
        exit_code = found.exit_code or EXIT_USER_ERROR
        found = replace(found, exit_code=exit_code, notes=(*found.notes, told))
        _write(found, folder)
        return found
    try:
        accepted = {reference.run for reference in history.references(recipe.name).values()}
        done = [variant.name for variant in found.variants if variant.status == "ok"]
        own = keep(folder, found.run, found.started, done)
        removed = clean_up(folder, recipe.retention, {*accepted, found.run}, observer)
        found = replace(found, removed=tuple(place(path) for path in removed))
        _write(found, folder)
        keep_reports(folder, own)
        shutil.rmtree(folder / "baseline" / LOGPROBS, ignore_errors=True)
        return found
    except QuantkitError as error:
        note = f"what the run made could not be kept: {error}"
        observer.note(f"warning: {note}")
        found = replace(found, notes=(*found.notes, note))
    _write(found, folder)
    return found


def _write(found: Check, folder: Path) -> None:
    write_check(found, folder)
    write_pages(found, folder)
