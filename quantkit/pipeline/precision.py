"""Further rounds of scoring, until all files are known as precisely as the recipe asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from quantkit.evaluation.rounds import next_reach
from quantkit.evaluation.stage import report_figures, score
from quantkit.pipeline.context import Run, attempted, evaluation_task, with_served
from quantkit.recipe import Recipe

OF_TEXTS = ("metrics", "texts", "served")
"""What of a row another round changes."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What a round has found.

    Attributes:
        baseline: the result of the float model.
        rows: of the report.
    """

    baseline: dict[str, Any]
    rows: list[dict[str, Any]]


def until_precise(current: Run, scored: Scored, score_float: Callable[[Run], dict[str, Any]]) -> Scored:
    """Score more of the texts that need it, all files on the same windows, until none does.

    Args:
        current: the run, as the first round had it.
        scored: what that has found.
        score_float: scores the float model on the reach of a run.

    Returns:
        What the last round has found; ``scored`` itself where there was none.
    """
    spec = current.recipe.evaluation
    while True:
        known = [row for row in scored.rows if row["status"] == "ok"]
        reach = next_reach(spec, current.reach, scored.baseline, known)
        if reach is None:
            return scored
        told = ", ".join(f"{text} {tokens:,}" for text, tokens in reach.items() if tokens > current.reach[text])
        current.observer.note(f"not precise enough yet: scored on as far as {told} tokens")
        current = replace(current, reach=reach, anew=False)
        baseline = score_float(current)
        rows = current.workers.each([partial(_again, current, row) for row in scored.rows])
        scored = Scored(baseline, rows)


def write_cards(scored: Scored, write: Callable[[dict[str, Any]], None], recipe: Recipe) -> None:
    """Write the figures of the last round into the model cards of the variants."""
    own = {variant.name for variant in recipe.variants}
    for row in scored.rows:
        if row["status"] == "ok" and row["name"] in own:
            write(row)


def _again(current: Run, row: dict[str, Any]) -> dict[str, Any]:
    """A row with the figures of this round; one that has failed stays as it is."""
    if row["status"] != "ok":
        return row
    scoring = replace(current.scored[row["name"]], reach=current.reach, anew=False)

    def work() -> dict[str, Any]:
        result = current.do(evaluation_task(scoring), partial(score, scoring), peak=False)
        figures = report_figures(with_served(current, scoring, result))
        seconds = {**row["seconds"], "evaluate": result["seconds"]}
        return {**{key: figures[key] for key in OF_TEXTS if key in figures}, "seconds": seconds}

    return attempted(current, row, work)
