"""A run in progress, and what is done for each row of its report."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from quantkit.errors import QuantkitError
from quantkit.evaluation.job import LOGPROBS
from quantkit.evaluation.stage import Scoring, score, served_figures
from quantkit.evaluation.stage_peak import StagePeaks
from quantkit.pipeline.titles import evaluation_title, served_title
from quantkit.pipeline.workers import HERE, Task, Work, Workers
from quantkit.recipe import Recipe, VariantSpec
from quantkit.system.artifacts import STAGE_FILE, write_text
from quantkit.system.devices import resolve_device
from quantkit.system.os_errors import cpu_ran_out
from quantkit.system.progress import Observer
from quantkit.system.redaction import redacted

if TYPE_CHECKING:
    from quantkit.pipeline.work_seconds import Seconds

T = TypeVar("T")
Baseline = Callable[[], dict[str, Any]]
"""Gives the figures of the float model, once they are there."""
NO_MEMORY = (
    "the memory of the CPU ran out, or what ulimit or a container leaves of it "
    "(close what else uses it, or use fewer or shorter calibration rows)"
)
BASELINE, BASELINE_SERVED, SERVED = "baseline", "baseline-served", "served"
"""Folders of the figures of the float model, of those as it is served, and of those of files as they are served."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run in progress: what its stages share.

    Attributes:
        recipe: what was asked for.
        folder: where everything of the run lies.
        observer: is told what happens.
        anew: score every file although its result is there.
        seen: the questions of the calibration set, which are not asked.
        installs: environments of libraries that are not there may be made.
        plain: of mixed variants, by name, what they became.
        peaks: what its stages took at most, those that were not reused.
        workers: who does what takes long.
        needs: bytes that stages are expected to take, by their titles, as far as that is known.
        takes: seconds that work is expected to take, by which walks are parted; None where that is not known.
        reach: tokens of each text that are scored, where a precision is asked for; empty for all at once.
        scored: what was scored, by name of the row.
    """

    recipe: Recipe
    folder: Path
    observer: Observer
    anew: bool = False
    seen: tuple[str, ...] = ()
    installs: bool = True
    plain: Mapping[str, VariantSpec] = field(default_factory=dict)
    peaks: StagePeaks = field(default_factory=StagePeaks)
    workers: Workers = HERE
    needs: Mapping[str, int] = field(default_factory=dict)
    takes: Seconds | None = None
    reach: Mapping[str, int] = field(default_factory=dict)
    scored: dict[str, Scoring] = field(default_factory=dict)

    def do(self, task: Task, work: Work[T], *, there: Callable[[], bool] = lambda: False, peak: bool = True) -> T:
        """Have a stage done, with the memory that it is expected to take.

        Args:
            task: it.
            work: what is done.
            there: whether its result is there.
            peak: measure what it takes, where it is done here.
        """
        task = replace(task, memory=task.memory or self.needs.get(task.title, 0))
        if not peak or self.workers is not HERE:
            return self.workers.do(task, work, self.observer)
        with self.peaks.of(task.title, resolve_device(task.device), there=there()):
            return self.workers.do(task, work, self.observer)

    @property
    def baseline(self) -> Path:
        """The figures and log-probabilities of the float model."""
        return self.folder / BASELINE

    def variant_folder(self, name: str) -> Path:
        """The checkpoint of a variant."""
        return self.folder / "variants" / name

    def log(self, kind: str, name: str = "") -> Path:
        """A log file of some kind, of a variant or of the whole run."""
        return self.folder / "logs" / (f"{kind}-{name}.log" if name else f"{kind}.log")


def attempted(current: Run, row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row with what ``work`` adds, or with the reason why it failed."""
    name = row["name"]
    try:
        return row | work()
    except QuantkitError as error:
        failure = str(error).removeprefix(f"{name}: ")
    except Exception as error:
        # A variant that fails must not take the others down, so any error becomes its row. What is not a
        # QuantkitError is a bug or a lack of memory, so its traceback is kept.
        if cpu_ran_out(error):
            current.observer.note(f"{name} failed: {NO_MEMORY}")
            return row | {"status": "failed", "error": NO_MEMORY}
        path = current.log("traceback", name)
        write_text(path, redacted("".join(traceback.format_exception(error))))
        failure = f"{type(error).__name__}: {redacted(str(error))} (unexpected: the traceback is in {path})"
    current.observer.note(f"{name} failed: {failure}")
    return row | {"status": "failed", "error": failure}


def score_beside(current: Run, name: str, folder: Path, content: Any, baseline: Baseline) -> dict[str, Any]:
    """Score a checkpoint, known by its ``content``, beside the baseline."""
    scoring = Scoring(
        name,
        folder,
        {"checkpoint": content, "reference": baseline()["fingerprint"]},
        current.recipe.evaluation,
        current.folder / "evaluations" / name,
        current.log("evaluate", name),
        current.baseline / LOGPROBS,
        current.recipe.model.trust_remote_code,
        current.anew,
        current.seen,
        current.recipe.max_memory,
        current.reach,
    )
    current.scored[name] = scoring
    task = evaluation_task(scoring)
    result = current.do(task, partial(score, scoring), peak=False)
    current.peaks.note(task.title, result.get("peak"), result["seconds"])
    return with_served(current, scoring, result)


def evaluation_task(scoring: Scoring) -> Task:
    """The scoring of a file as a piece of work."""
    reads = (marker(scoring.checkpoint),)
    return Task(evaluation_title(scoring.name), scoring.spec.device, reads=reads, outputs=(scoring.out,))


def with_served(current: Run, scoring: Scoring, result: dict[str, Any]) -> dict[str, Any]:
    """A result with ``served``, the figures of the file as a server computes with it, where the recipe asks for them.

    A file that is not served is no failed row: ``served`` then has ``missing``, the reason.

    Args:
        current: the run.
        scoring: of the file, by the recipe's loader; of the float model without a reference.
        result: its result.
    """
    spec = scoring.spec.as_served
    if spec is None:
        return result
    is_baseline = scoring.reference is None
    served = replace(
        scoring,
        identity={"checkpoint": scoring.identity, "beside": result["fingerprint"]},
        spec=spec,
        out=current.folder / (BASELINE_SERVED if is_baseline else f"{SERVED}/{scoring.name}"),
        log=current.log(BASELINE_SERVED) if is_baseline else current.log(SERVED, scoring.name),
        reference=scoring.reference or scoring.out / LOGPROBS,
    )
    reads = (marker(scoring.checkpoint),)
    task = Task(served_title(scoring.name, spec.loader), spec.device, reads=reads, outputs=(served.out,))
    try:
        return {**result, "served": served_figures(current.do(task, partial(score, served), peak=False))}
    except QuantkitError as error:
        current.observer.note(f"{scoring.name}: {error}")
        return {**result, "served": {"by": spec.loader, "missing": str(error)}}


def marker(path: Path) -> Path:
    """The file by which it is known whether a machine sees a checkpoint: itself, or one that its folder has."""
    files = (path, path / "config.json", path / STAGE_FILE)  # a folder with a GGUF file has no config
    return next((file for file in files if file.is_file()), files[1])
