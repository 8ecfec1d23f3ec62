"""Tasks and answers: a table with a row per figure, and the answers that are not the float model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.report.columns import Cell, Column, Record, reference_name, rows_of
from quantkit.report.numbers import ABSENT, count, decimals_for, figure, fixed, margin, percent, pick

KINDS = ("tasks", "task_losses", "answers")
"""Metrics that have a value, a standard error and a number of samples for each name."""
LEAST_DECIMALS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of all models.

    Attributes:
        name: such as ``arc_easy.acc``, or ``answers.rougeL``.
        samples: over how many documents or answers.
        cells: the float model's first, then one per variant.
    """

    name: str
    samples: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Changed:
    """A variant's answers beside the float model's.

    Attributes:
        headline: how many changed.
        examples: of some of them question, expected answer, the float model's and the variant's.
    """

    headline: str
    examples: tuple[tuple[str, str, str, str], ...]


def further_rows(report: Record) -> list[Row]:
    """The figures of all tasks, then of the answers."""
    models = rows_of(report)
    found = []
    for kind in KINDS:
        names: dict[str, None] = {}
        for model in models:
            names.update(dict.fromkeys(pick(model, "metrics", kind) or {}))
        found += [_row(models, kind, name) for name in names]
    return found


def further_columns(report: Record) -> dict[str, Column]:
    """The same as columns, for a table that has a row per model."""
    return {f"further:{row.name}": Column(row.name, row.cells) for row in further_rows(report)}


def further_models(report: Record) -> list[str]:
    """The titles of the cells of a row."""
    return [reference_name(report), *(str(variant["name"]) for variant in report["variants"])]


def changed_answers(variant: Record) -> Changed | None:
    """A variant's answers beside the float model's; None where none were compared."""
    about = variant.get("answers")
    number, whole = figure(about, "changed"), figure(about, "questions")
    if not isinstance(about, Mapping) or number is None or not whole:
        return None
    examples = tuple(
        tuple(str(each.get(key, "")) for key in ("question", "expected", "float", "generated"))
        for each in about.get("examples") or []
    )
    headline = f"{count(number)} of {count(whole)} answers are not the float model's ({percent(number / whole)})"
    return Changed(headline, tuple(each for each in examples if len(each) == 4))


def _row(models: Sequence[Record], kind: str, name: str) -> Row:
    values, errors = (
        [figure(model, "metrics", kind, name, field) for model in models] for field in ("value", "stderr")
    )
    contest = [value for value in values[1:] if value is not None]
    best = None
    if len(set(contest)) > 1:
        best = min(contest) if kind == "task_losses" else max(contest)
    places = decimals_for(errors, digits=2, least=LEAST_DECIMALS, most=6)
    cells = [
        Cell(_text(value, error, places), best is not None and value == best and place > 0)
        for place, (value, error) in enumerate(zip(values, errors, strict=True))
    ]
    samples: list[Any] = [figure(model, "metrics", kind, name, "samples") for model in models]
    shown = next((count(each) for each in samples if each is not None), ABSENT)
    return Row(f"answers.{name}" if kind == "answers" else name, shown, tuple(cells))


def _text(value: float | None, error: float | None, places: int) -> str:
    return fixed(value, places) if value is None or error is None else f"{fixed(value, places)} {margin(error, places)}"
