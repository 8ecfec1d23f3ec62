"""The gates of a recipe judged on a run, beside the runs that are accepted, and the verdict in words."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from quantkit.gates.compare import TIMINGS, why_not
from quantkit.gates.judge import RUNS_FOR_SPREAD, judge_absolute, judge_relative, percent
from quantkit.gates.noise import Spread
from quantkit.gates.record import VariantRecord
from quantkit.gates.results import GateResult, Outcome
from quantkit.gates.syntax import Gate, parse_gate
from quantkit.recipe import Recipe
from quantkit.run_history.record import RunRecord
from quantkit.run_history.store import DEFAULT_FILE


@dataclass(frozen=True, slots=True)
class Beside:
    """What a run is compared with.

    Attributes:
        references: for each variant that has one its accepted run, whole.
        earlier: the runs before, oldest first, without windows.
    """

    references: Mapping[str, RunRecord]
    earlier: Sequence[RunRecord]

    def variant(self, name: str) -> VariantRecord | None:
        """The variant in its accepted run, or None."""
        run = self.references.get(name)
        return None if run is None else run.variant(name)


def judge(gates: Sequence[str], run: RunRecord, beside: Beside) -> list[GateResult]:
    """The verdict of every gate on every variant, gate by gate.

    Raises:
        RecipeError: a gate cannot be read.
    """
    results = []
    for gate in map(parse_gate, gates):
        results += [_result(gate, variant, run, beside, _texts_of(gate, run)) for variant in run.variants]
    return results


def _texts_of(gate: Gate, run: RunRecord) -> list[str]:
    """The texts that any variant has a gate's metric of, and those on which it was scored without a finite figure."""
    found = {key[1] for variant in run.variants for key in variant.figures if key[0] == gate.metric}
    if gate.about.per_text and not gate.about.implied:
        found.update(text for variant in run.variants for text in variant.texts)
    return sorted(found)


def verdict(results: Sequence[GateResult], run: RunRecord) -> Outcome:
    """``regressed`` if any gate is, else ``unknown`` if any cannot be told or a variant failed, else ``passed``."""
    outcomes = {result.outcome for result in results}
    if "regressed" in outcomes:
        return "regressed"
    failed = any(variant.status != "ok" for variant in run.variants)
    return "unknown" if failed or "unknown" in outcomes or not outcomes else "passed"


def _result(gate: Gate, variant: VariantRecord, run: RunRecord, beside: Beside, texts: Sequence[str]) -> GateResult:
    if gate.kind == "absolute":
        return judge_absolute(gate, variant, texts)
    if gate.kind == "baseline":
        return judge_relative(gate, variant, run.baseline, texts, absent="the float model was not scored")
    absent = f"no run is accepted for variant {variant.name}"
    then = beside.variant(variant.name)
    return judge_relative(gate, variant, then, texts, absent=absent, spreads=speed_spreads(variant, beside.earlier))


def speed_spreads(variant: VariantRecord, earlier: Sequence[RunRecord]) -> dict[str, Spread]:
    """How much each speed differs from run to run on this machine, where enough earlier runs tell it.

    A run that regressed and that nobody accepted does not count: its speed may be what was wrong with it.
    """
    sound = [run for run in earlier if run.verdict != "regressed" or variant.name in run.accepted]
    records = [found for run in sound if (found := run.variant(variant.name)) is not None]
    alike = [record for record in records if why_not("speed", None, variant, record) is None]
    spreads = {}
    for figure in TIMINGS:
        speeds = [record.figures.get(("speed", "", figure), 0.0) for record in alike]
        logs = [math.log(speed) for speed in speeds if speed > 0]
        if len(logs) >= RUNS_FOR_SPREAD:
            spreads[figure] = Spread(stdev(logs), len(logs) - 1)
    return spreads


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
