"""Texts that are scored in rounds, until what is compared is known as precisely as a recipe asks.

All files of a run are scored on the same windows. The first round has :data:`FIRST` windows of each text; a text of
which some file's figures are not precise yet has twice as many in the next, of which the new ones are read, up to
``max_tokens``. How far a round goes is its *reach*: tokens of each text.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.gates.precision import relative_error
from quantkit.recipe import EvaluationSpec
from quantkit.system.artifacts import read_json, write_json

FIRST = 8
"""Windows of the first round: of fewer, their spread says little of the error."""
ROUNDS = "rounds.json"
"""What a stage has found in each of its rounds, the last one too."""


def first_reach(spec: EvaluationSpec) -> dict[str, int]:
    """Tokens of each text in the first round; empty where no precision is asked for, and all are scored at once."""
    if spec.precision is None:
        return {}
    return {text.name: min(FIRST * spec.context_length, spec.max_tokens) for text in spec.texts}


def next_reach(
    spec: EvaluationSpec, reach: Mapping[str, int], baseline: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, int] | None:
    """Tokens of each text in the next round; None where each is precise or has no more.

    Args:
        spec: with the precision that is asked for.
        reach: of the last round.
        baseline, rows: ``metrics`` and ``texts`` that the float model and each file have on it.
    """
    longer = {}
    for text, tokens in reach.items():
        has_more = tokens < spec.max_tokens and _windows(baseline, text) >= tokens // spec.context_length
        wanted = has_more and not all(is_precise(spec, row, baseline, text) for row in rows)
        longer[text] = min(2 * tokens, spec.max_tokens) if wanted else tokens
    return None if longer == dict(reach) else longer


def is_precise(spec: EvaluationSpec, row: Mapping[str, Any], baseline: Mapping[str, Any], text: str) -> bool:
    """Whether the standard errors of a file on a text are as small as is asked."""
    error = relative_error(row, baseline, text)
    return spec.precision is None or (error is not None and error <= spec.precision)


def texts_alone(spec: EvaluationSpec) -> EvaluationSpec:
    """The same without what the first round has taken: memory, speed, tasks, answers and samples."""
    metrics = tuple(metric for metric in spec.metrics if metric not in ("memory", "speed"))
    return spec.model_copy(update={"metrics": metrics, "tasks": (), "answers": None, "samples": None})


def joined(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a round with what the first one found beside the texts, and the time of all."""
    return {
        **earlier,
        "metrics": {**earlier["metrics"], **later["metrics"]},
        "texts": later["texts"],
        "notes": list(dict.fromkeys([*earlier["notes"], *later["notes"]])),
        "seconds": earlier["seconds"] + later["seconds"],
    }


def write_round(folder: Path, reach: Mapping[str, int], result: Mapping[str, Any], before: Path | None) -> None:
    """Write what a stage has found on this reach beside what it has on shorter ones.

    Args:
        folder: of the stage, as it is written.
        reach: of the round.
        result: what was found.
        before: of the stage, as it stands with the rounds before; None for the first.
    """
    rounds = [] if before is None else read_json(before / ROUNDS)
    write_json(folder / ROUNDS, [*rounds, {"reach": dict(reach), "result": dict(result)}])


def round_of(folder: Path, reach: Mapping[str, int]) -> dict[str, Any]:
    """What a stage has found on a reach.

    Raises:
        OSError: it has no rounds.
        ValueError: its file is damaged, or it has nothing on this one.
    """
    for each in read_json(folder / ROUNDS):
        if each["reach"] == dict(reach):
            found: dict[str, Any] = each["result"]
            return found
    raise ValueError(f"{folder} has nothing on {dict(reach)}")


def take_over(before: Path, folder: Path, names: Sequence[str]) -> None:
    """Copy files of the rounds before that this one does not write."""
    for name in names:
        if (before / name).is_file():
            shutil.copy(before / name, folder / name)


def _windows(row: Mapping[str, Any], text: str) -> int:
    return int(row["texts"][text]["windows"])
