"""How close answers are to the expected ones, each figure with its standard error over answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from quantkit.errors import EvaluationError, MissingDependencyError
from quantkit.recipe import ANSWER_METRICS
from quantkit.system.distribution import requirement
from quantkit.system.units import finite

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
Metric = Callable[[Sequence[str], Sequence[str]], dict[str, dict[str, Any]]]
"""Answers and expected answers to figures, each with ``value``, ``stderr`` and ``samples``."""


def answer_metric(name: str, *, trusted: bool) -> Metric:
    """A metric by its name in a recipe.

    Args:
        name: ``exact_match``, ``rouge``, or the folder of a metric of Hugging Face ``evaluate``.
        trusted: run Python code of the user's.

    Raises:
        MissingDependencyError: the package that it needs is not installed.
        EvaluationError: it is code that is not trusted, or there is none.
    """
    if name == "exact_match":
        return exact_match
    return _rouge() if name in ANSWER_METRICS else _script(Path(name), trusted=trusted)


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Share of answers that are the expected ones, white space around them aside."""
    found = [float(one.strip() == other.strip()) for one, other in zip(answers, expected, strict=True)]
    return {"exact_match": _mean(found)}


def _rouge() -> Metric:
    """ROUGE (Lin 2004), the F-measure, by the package that the metric ``rouge`` of ``evaluate`` calls."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingDependencyError("rouge-score", "the metric 'rouge'", requirement("tasks")) from error
    scorer = RougeScorer(ROUGE)

    def rouge(answers: Sequence[str], expected: Sequence[str]) -> dict[str, dict[str, Any]]:
        found = [scorer.score(right, given) for given, right in zip(answers, expected, strict=True)]
        return {name: _mean([each[name].fmeasure for each in found]) for name in ROUGE}

    return rouge


def _script(folder: Path, *, trusted: bool) -> Metric:
    """A metric that is a script, which is Python code."""
    if not trusted:
        raise EvaluationError(
            f"metric {folder} is Python code",
            "set model.trust_remote_code if you trust it, or use exact_match or rouge",
        )
    if not folder.exists():
        raise EvaluationError(f"there is no metric {folder}", "give the folder of a metric of Hugging Face evaluate")
    try:
        import evaluate
    except ImportError as error:
        raise MissingDependencyError("evaluate", f"metric {folder}", requirement("tasks")) from error
    try:
        module = evaluate.load(str(folder), keep_in_memory=True)
    except Exception as error:  # it runs the user's code, which may raise anything
        raise EvaluationError(f"metric {folder} cannot be loaded: {type(error).__name__}: {error}") from error

    def computed(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
        found: Mapping[str, Any] = module.compute(predictions=list(answers), references=list(expected))
        return {name: number for name, value in found.items() if (number := finite(_plain(value))) is not None}

    return lambda answers, expected: jackknifed(computed, answers, expected)


def jackknifed(
    compute: Callable[[Sequence[str], Sequence[str]], dict[str, float]], answers: Sequence[str], expected: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Figures of all answers together, with the jackknife's standard error (Efron 1982, chapter 3).

    For a mean over answers that is ``s / sqrt(n)``; it holds for other smooth figures too, such as BLEU.
    """
    count = len(answers)
    whole = compute(answers, expected)
    without = [
        compute([*answers[:place], *answers[place + 1 :]], [*expected[:place], *expected[place + 1 :]])
        for place in range(count)
    ]
    found = {}
    for name, value in whole.items():
        parts = [each[name] for each in without if name in each]
        known = len(parts) == count and count > 1
        spread = math.sqrt((count - 1) / count * sum((part - fmean(parts)) ** 2 for part in parts)) if known else None
        found[name] = {"value": value, "stderr": spread, "samples": count}
    return found


def _mean(values: Sequence[float]) -> dict[str, Any]:
    spread = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": fmean(values), "stderr": spread, "samples": len(values)}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
