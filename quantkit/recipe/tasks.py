"""What of ``evaluation`` asks for more than likelihoods: tasks of lm-evaluation-harness, and answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from quantkit.errors import RecipeError, did_you_mean
from quantkit.gates import Gate
from quantkit.recipe.fields import Flag, Section, Whole, require_distinct

AnswerMetric = Literal["exact_match", "rouge"]
ANSWER_METRICS: tuple[AnswerMetric, ...] = ("exact_match", "rouge")
ANSWER_FIGURES = {"exact_match": ("exact_match",), "rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum")}
"""The figures that each metric gives."""
_TASK_FILE = re.compile(r"/|\.ya?ml$")


class TaskSpec(Section):
    """A task of lm-evaluation-harness: exactly one of ``name`` and ``file``.

    Attributes:
        name: a task, group or tag that lm-evaluation-harness knows, such as ``arc_easy``.
        file: a task file of one's own, with its data beside it.
        limit: score the first so many documents alone.
        fewshot: solved examples in each prompt; the task's own number if not given.
        max_length: tokens of prompt and answer together; a longer prompt loses its beginning.
        chat_template: put each prompt into the model's chat template.
    """

    name: Annotated[str, Field(min_length=1)] | None = None
    file: str | None = None
    limit: Annotated[Whole, Field(ge=1)] | None = None
    fewshot: Annotated[Whole, Field(ge=0)] | None = None
    max_length: Annotated[Whole, Field(ge=16)] = 2048
    chat_template: Flag = False

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"file" if _TASK_FILE.search(given) else "name": given}
        return given

    @model_validator(mode="after")
    def _one_origin(self) -> TaskSpec:
        if (self.name is None) == (self.file is None):
            raise ValueError("give exactly one of 'name' and 'file'")
        return self

    @property
    def label(self) -> str:
        """What progress and messages call it."""
        return self.name or Path(str(self.file)).stem


class AnswerSpec(Section):
    """Answers to instructions that the model has not been calibrated on: at most one of ``file`` and ``dataset``.

    Attributes:
        file: records as JSON, JSONL or Parquet; without ``file`` and ``dataset``, those that ship with quantkit.
        dataset: a hub data set, with ``config``, ``split`` and ``revision``.
        samples: records to answer; those of the calibration set are left out.
        seed: order in which records are drawn.
        max_new_tokens: tokens of an answer at most.
        metrics: ``exact_match``, ``rouge``, or the folder of a metric of Hugging Face ``evaluate``, which is Python
            code and runs only with ``model.trust_remote_code``.
    """

    file: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    samples: Annotated[Whole, Field(ge=2)] = 64
    seed: Whole = 0
    max_new_tokens: Annotated[Whole, Field(ge=1)] = 64
    metrics: Annotated[tuple[str, ...], Field(min_length=1)] = ANSWER_METRICS

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_origin(self) -> AnswerSpec:
        if self.file is not None and self.dataset is not None:
            raise ValueError("give at most one of 'file' and 'dataset'")
        return self

    @field_validator("metrics")
    @classmethod
    def _metrics_are_known(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        require_distinct(list(metrics), "metrics")
        for metric in metrics:
            if metric not in ANSWER_METRICS and "/" not in metric:
                known = ", ".join(ANSWER_METRICS)
                raise ValueError(f"unknown metric '{metric}': known: {known}, or the folder of a metric, with a '/'")
        return metrics

    @property
    def figures(self) -> list[str] | None:
        """The names of its figures; None where a metric is code, of which nobody knows what it gives."""
        if any(metric not in ANSWER_FIGURES for metric in self.metrics):
            return None
        return [figure for metric in self.metrics for figure in ANSWER_FIGURES[metric]]


def check_further_gate(gate: Gate, tasks: Sequence[TaskSpec], answers: AnswerSpec | None) -> None:
    """Refuse a gate on tasks or answers that the recipe does not ask for.

    Raises:
        RecipeError: with the key that is missing, or the figures that there are.
    """
    if gate.metric in ("tasks", "task_losses") and not tasks:
        raise RecipeError(f"gate '{gate.text}' needs tasks", "name them in evaluation.tasks")
    if gate.metric != "answers":
        return
    if answers is None:
        raise RecipeError(f"gate '{gate.text}' needs answers", "give evaluation.answers")
    if gate.on is not None and answers.figures is not None and gate.on not in answers.figures:
        remedy = did_you_mean(gate.on, answers.figures)
        raise RecipeError(f"gate '{gate.text}': answers have no figure '{gate.on}'", remedy)
