"""The verdict of a check in one line, and what the reader should know beside it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from quantkit.gates.judge import percent
from quantkit.gates.results import GateResult, Outcome
from quantkit.recipe import Recipe
from quantkit.regression.judging import Beside
from quantkit.run_history.record import RunRecord
from quantkit.run_history.store import DEFAULT_FILE


def summary(outcome: Outcome, results: Sequence[GateResult], run: RunRecord) -> str:
    """The verdict in words."""
    failed = [variant for variant in run.variants if variant.status != "ok"]
    if outcome == "passed":
        gates, variants = len({result.gate for result in results}), len(run.variants)
        return f"passed: {_counted(gates, 'gate')} on {_counted(variants, 'variant')}"
    if outcome == "unknown" and failed:
        return f"cannot be told: variant {failed[0].name} failed: {failed[0].error}"
    chosen = [result for result in results if result.outcome == outcome]
    first, rest = chosen[0], len(chosen) - 1
    words = "regressed" if outcome == "regressed" else "cannot be told"
    more = f" (and {_counted(rest, 'gate')} more)" if rest else ""
    return f"{words}: {first.variant}: {first.gate}: {first.reason}{more}"


def notes(results: Sequence[GateResult], run: RunRecord, beside: Beside, recipe: Recipe) -> list[str]:
    """What the verdict alone does not say: how to accept a run, and which gates have too little data."""
    found = []
    lacking = [variant.name for variant in run.variants if variant.name not in beside.references]
    if lacking:
        number = "RUN" if run.id is None else str(run.id)
        found.append(
            f"no run is accepted for {', '.join(lacking)}: if this one is good,"
            f" '{accept_command(recipe, number)}' makes it the reference"
        )
    for result in results:
        weak = [
            each
            for each in result.comparisons
            if result.kind != "absolute" and each.detectable is not None and each.detectable > max(result.allowed, 0.0)
        ]
        if weak and result.outcome == "passed":
            least = max(each.detectable or 0.0 for each in weak)
            where = f"{result.variant}: {result.gate}"
            found.append(f"{where}: too little data for it: only from {percent(least)} on would a worsening be found")
    return found


def accept_command(recipe: Recipe, number: str) -> str:
    """The command that accepts a run of the recipe."""
    file = recipe.history_file.absolute()
    shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    option = "" if shown == DEFAULT_FILE else f" --file {shlex.quote(str(shown))}"
    return f"quantkit accept {number}{option}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
