"""A run in progress, and what is done for each row of its report."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.evaluation.stage import LOGPROBS, Scoring, score, served_figures
from quantkit.evaluation.stage_peak import StagePeaks
from quantkit.pipeline.titles import evaluation_title, served_title
from quantkit.recipe import Recipe, VariantSpec
from quantkit.system.artifacts import write_text
from quantkit.system.progress import Observer
from quantkit.system.redaction import redacted


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
    """

    recipe: Recipe
    folder: Path
    observer: Observer
    anew: bool = False
    seen: tuple[str, ...] = ()
    installs: bool = True
    plain: Mapping[str, VariantSpec] = field(default_factory=dict)
    peaks: StagePeaks = field(default_factory=StagePeaks)

    @property
    def baseline(self) -> Path:
        """The figures and log-probabilities of the float model."""
        return self.folder / "baseline"

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
        failure = str(error)
    except Exception as error:
        # A variant that fails must not take the others down, so any error becomes its row. What is not a
        # QuantkitError is a bug or a lack of memory, so its traceback is kept.
        path = current.log("traceback", name)
        write_text(path, redacted("".join(traceback.format_exception(error))))
        failure = f"{type(error).__name__}: {redacted(str(error))} (unexpected: the traceback is in {path})"
    current.observer.note(f"{name} failed: {failure}")
    return row | {"status": "failed", "error": failure}


def score_beside(current: Run, name: str, folder: Path, content: Any, baseline: dict[str, Any]) -> dict[str, Any]:
    """Score a checkpoint, known by its ``content``, beside the baseline."""
    current.observer.stage(evaluation_title(name))
    scoring = Scoring(
        name,
        folder,
        {"checkpoint": content, "reference": baseline["fingerprint"]},
        current.recipe.evaluation,
        current.folder / "evaluations" / name,
        current.log("evaluate", name),
        current.baseline / LOGPROBS,
        current.recipe.model.trust_remote_code,
        current.anew,
        current.seen,
        current.recipe.max_memory,
    )
    result = score(scoring, current.observer)
    current.peaks.note(evaluation_title(name), result.get("peak"))
    return with_served(current, scoring, result)


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
    current.observer.stage(served_title(scoring.name, spec.loader))
    is_baseline = scoring.reference is None
    served = replace(
        scoring,
        identity={"checkpoint": scoring.identity, "beside": result["fingerprint"]},
        spec=spec,
        out=current.folder / ("baseline-served" if is_baseline else f"served/{scoring.name}"),
        log=current.log("baseline-served") if is_baseline else current.log("served", scoring.name),
        reference=scoring.reference or scoring.out / LOGPROBS,
    )
    try:
        return {**result, "served": served_figures(score(served, current.observer))}
    except QuantkitError as error:
        current.observer.note(f"{scoring.name}: {error}")
        return {**result, "served": {"by": spec.loader, "missing": str(error)}}
