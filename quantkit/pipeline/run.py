"""A run: from a recipe to a report, stage by stage, each reused where its result is already there."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import calibration, records, report
from quantkit.calibration import CalibrationSet
from quantkit.checkpoint import CheckpointReader
from quantkit.engine.passes import CPU
from quantkit.errors import OutputError, QuantkitError
from quantkit.estimation.measured import known_anatomy
from quantkit.evaluation.answers import asked
from quantkit.evaluation.rounds import first_reach
from quantkit.evaluation.stage import Scoring, score
from quantkit.merging import merged_source
from quantkit.pipeline.cleanup import clear_leftovers
from quantkit.pipeline.content import report_content
from quantkit.pipeline.context import Baseline, Run, marker, with_served
from quantkit.pipeline.duration import foreseen
from quantkit.pipeline.jobs import needs_calibration, quantize_job, with_sensitivity
from quantkit.pipeline.library_rows import check_environments
from quantkit.pipeline.precision import Scored, until_precise, write_cards
from quantkit.pipeline.preflight import preflight, preflight_of_files, preflight_of_machine
from quantkit.pipeline.rows import other_merge_rows, variant_rows, write_scored_card
from quantkit.pipeline.stage_needs import beside_peaks, check_bounds, stage_needs
from quantkit.pipeline.titles import BASELINE_TITLE, CALIBRATION_TITLE, SENSITIVITY_TITLE, SOURCE_TITLE
from quantkit.pipeline.work_seconds import Seconds
from quantkit.pipeline.workers import HERE, Task, Workers
from quantkit.publishing.mlflow import track_after
from quantkit.quantization import Job
from quantkit.recipe import Recipe
from quantkit.system.artifacts import STAGE_FILE, check_writable, translated_os_errors
from quantkit.system.devices import resolve_device
from quantkit.system.distribution import own_version
from quantkit.system.events import event_log
from quantkit.system.locks import check_held, held
from quantkit.system.pace import tell_ahead
from quantkit.system.progress import Observer, Several

if TYPE_CHECKING:
    from quantkit.estimation.stages import StageNeed
    from quantkit.source import SourceModel

EVENTS = "events.jsonl"
"""In the folder of logs: what happened in every run of this folder."""


def run(recipe: Recipe, observer: Observer, *, installs: bool = True, workers: Workers = HERE) -> dict[str, Any]:
    """Run a recipe and write its report.

    A variant that fails becomes a row of the report that says why; the others go on.

    Args:
        recipe: what to do.
        observer: is told what happens.
        installs: environments of libraries that are not there may be made.
        workers: who does what takes long.

    Returns:
        The content of ``report.json``; its ``status`` is ``failed`` if a variant or a gate failed.

    Raises:
        QuantkitError: the model, the calibration set or the baseline cannot be had, so that no variant can run; the
            environment of a library is not there and may not be made.
    """
    current = Run(recipe, recipe.folder, observer, installs=installs, workers=workers)
    check_folders(current)
    with held(current.folder, f"run {recipe.name}", inside=True):
        clear_leftovers(current.folder, [current.variant_folder(variant.name) for variant in recipe.variants])
        with workers.share(current.folder):
            return run_holding(current)


def run_holding(current: Run) -> dict[str, Any]:
    """What :func:`run` does, for one who holds the lock of the run's folder."""
    file = current.folder / "logs" / EVENTS
    with event_log(file, name=current.recipe.name, quantkit=own_version()) as log:
        content = _run(replace(current, observer=Several(current.observer, log)))
        log.write("end", **outcome(content))
    return content


def outcome(content: dict[str, Any]) -> dict[str, Any]:
    """What the last line of an event log says of a report: its status, that of each variant, and the gates missed."""
    return {
        "status": content["status"],
        "variants": {row["name"]: row["status"] for row in content["variants"]},
        "gates_missed": [f"{gate['variant']}: {gate['gate']}" for gate in content["gates"] if not gate["passed"]],
    }


def _run(current: Run) -> dict[str, Any]:
    recipe, observer = current.recipe, current.observer
    is_here = current.workers is HERE
    if is_here:
        preflight(recipe)
        check_environments(current)
    else:
        preflight_of_files(recipe)
        checks = current.workers.soon(partial(_check_there, current))
    for warning in recipe.warnings():
        observer.note(f"warning: {warning}")
    observer.stage(f"source: {recipe.model.source}")
    with current.peaks.of(SOURCE_TITLE, CPU):
        model = merged_source(recipe.model, recipe.merge, current.folder, observer)
    with current.peaks.of(CALIBRATION_TITLE, CPU, there=_is_there(current.folder / "calibration")):
        calibrated = _calibrate(current, model)
    current = replace(current, seen=seen_questions(recipe, calibrated))
    job = quantize_job(recipe, model, calibrated)
    needs = _needs(current, model, job, calibrated.tokens if calibrated else 0)
    current = replace(current, needs={need.stage: need.nbytes or 0 for need in needs or ()})
    if is_here:
        _foresee(current, model, job, calibrated.tokens if calibrated else 0)
    else:
        current = replace(current, takes=_takes(recipe, model, job, calibrated.tokens if calibrated else 0))
        checks()
    current = replace(current, reach=first_reach(recipe.evaluation))
    baseline, audit = _baseline(current, model), calibrated.audit if calibrated else None
    job = _sensitive(current, job)
    rows = other_merge_rows(current, baseline)
    rows += variant_rows(current, job, baseline, audit)
    scored = Scored(baseline(), rows)
    if recipe.evaluation.precision is not None:
        longer = until_precise(current, scored, lambda later: _baseline(later, model)())
        if longer is not scored:
            write_cards(longer, partial(write_scored_card, job, lambda: longer.baseline, audit), recipe)
        scored = longer
    stages = beside_peaks(needs, current.peaks.found)
    content = report_content(current, model, calibrated, scored.baseline, scored.rows, stages)
    check_held(current.folder, inside=True)
    report.write(content, current.folder, recipe.report.formats)
    track_after(recipe.tracking, current.folder, observer)
    return content


def _is_there(folder: Path) -> bool:
    return (folder / STAGE_FILE).exists()


def _foresee(current: Run, model: SourceModel, job: Job, tokens: int) -> None:
    """Tell how long the run will take, as far as that is known."""
    found = foreseen(current.recipe, model, job, tokens, anew=current.anew)
    if found is not None:
        tell_ahead(current.observer, found.ahead)


def check_folders(current: Run) -> None:
    """Find out before any work whether all that the run will write can be written, and make its folder."""
    folder = current.folder
    if folder.is_file():
        raise OutputError(f"{folder} exists and is not a folder", "set report.folder to another one")
    check_writable(current.baseline)
    for variant in current.recipe.variants:
        check_writable(current.variant_folder(variant.name))
    with translated_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _calibrate(current: Run, model: SourceModel) -> CalibrationSet | None:
    if not needs_calibration(current.recipe):
        return None
    spec = current.recipe.calibration
    current.observer.stage(f"calibration: {spec.dataset}")
    found = calibration.build(
        spec, model.folder, current.folder / "calibration", trust_remote_code=current.recipe.model.trust_remote_code
    )
    for line in calibration.audit_lines(found.audit):
        current.observer.note(line)
    return found


def seen_questions(recipe: Recipe, calibrated: CalibrationSet | None) -> tuple[str, ...]:
    """The questions in the records that are in the calibration set, where the recipe asks for answers.

    Raises:
        CalibrationError: the data set cannot be read.
    """
    if calibrated is None or recipe.evaluation.answers is None:
        return ()
    spec = recipe.calibration
    found = records.load(spec.dataset, spec.columns, spec.tags)
    by_index = dict(zip(found.indices(), found.records, strict=True))
    used = (by_index[index] for index in calibrated.audit["records"]["used_indices"])
    return tuple(sorted({question for record in used for question in asked(record)}))


def _check_there(current: Run) -> None:
    task = Task("checks", current.recipe.quantization.first)
    current.workers.do(task, partial(_checked, current.recipe), current.observer)


def _takes(recipe: Recipe, model: SourceModel, job: Job, tokens: int) -> Seconds | None:
    """What work takes by the rates of this machine; None where nothing is known of the model, or of its device here."""
    anatomy = known_anatomy(model.folder)
    with suppress(QuantkitError):
        return None if anatomy is None else Seconds(recipe, anatomy, job, tokens)
    return None


def _checked(recipe: Recipe, _: Observer) -> None:
    """Look for what a recipe needs, where its work is done."""
    preflight_of_machine(recipe)


def _needs(current: Run, model: SourceModel, job: Job, tokens: int) -> list[StageNeed] | None:
    """What the stages will take; None where that is not known, as of nodes with a device that is not here."""
    if current.workers is not HERE:
        with suppress(QuantkitError):
            return stage_needs(current.recipe, model, job, tokens)
        return None
    needs = stage_needs(current.recipe, model, job, tokens)
    check_bounds(needs or (), current.recipe)
    return needs


def _sensitive(current: Run, job: Job) -> Job:
    """The job with what the model is sensitive to, if the recipe asks for that."""
    spec, folder = current.recipe.calibration, current.folder / "sensitivity"
    work = partial(with_sensitivity, job, spec, folder)
    if current.workers is HERE:
        there = _is_there(folder) or not spec.wants_sensitivity
        with current.peaks.of(SENSITIVITY_TITLE, resolve_device(job.device), there=there):
            return work(current.observer)
    if not spec.wants_sensitivity or not job.rows:
        return job
    return current.do(Task(SENSITIVITY_TITLE, job.device, reads=(marker(job.source),), outputs=(folder,)), work)


def _baseline(current: Run, model: SourceModel) -> Baseline:
    """Gives the figures of the float model; its weights are checked before they are run for the first time."""
    scoring = Scoring(
        "baseline",
        model.folder,
        model.made_from(),
        current.recipe.evaluation,
        current.baseline,
        current.log("baseline"),
        trust_remote_code=current.recipe.model.trust_remote_code,
        anew=current.anew,
        seen=current.seen,
        bounds=current.recipe.max_memory,
        reach=current.reach,
    )
    reads = (marker(model.folder),)
    task = Task(BASELINE_TITLE, current.recipe.evaluation.device, reads=reads, outputs=(scoring.out,))

    def found() -> dict[str, Any]:
        result = current.do(task, partial(_score_float, scoring), peak=False)
        current.peaks.note(task.title, result.get("peak"), result["seconds"])
        return with_served(current, scoring, result)

    return current.workers.soon(found)


def _score_float(scoring: Scoring, observer: Observer) -> dict[str, Any]:
    """Score the float model, wherever that is done."""
    if scoring.finished() is None:
        reader = CheckpointReader(scoring.checkpoint)
        for name in reader.names():
            reader.read_finite(name)
    return score(scoring, observer)
