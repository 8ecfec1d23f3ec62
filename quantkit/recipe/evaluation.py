"""The section ``evaluation``: how exported files are scored, and on which texts, tasks and instructions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from quantkit.errors import RecipeError, did_you_mean
from quantkit.gates import Gate
from quantkit.recipe.columns import Columns, Tags, with_entry
from quantkit.recipe.fields import Device, Flag, Name, Place, Section, Whole, named_after, require_distinct
from quantkit.runtimes import RUNTIMES
from quantkit.system.names import chosen
from quantkit.system.validation import located

Bos = Literal["window", "stream", "none"]
Metric = Literal["perplexity", "kl_divergence", "top1_agreement", "memory", "speed"]
COMPARING_METRICS: tuple[Metric, ...] = ("kl_divergence", "top1_agreement")
METRICS: tuple[Metric, ...] = ("perplexity", "kl_divergence", "top1_agreement", "memory", "speed")
BUNDLED_TEXTS = ("prose", "answers")
AnswerMetric = Literal["exact_match", "rouge"]
AUTO, WHOLE, STREAMED = LOADERS = ("auto", "whole", "streamed")
"""How checkpoints are loaded where no runtime is named."""
ANSWER_METRICS: tuple[AnswerMetric, ...] = ("exact_match", "rouge")
ANSWER_FIGURES = {"exact_match": ("exact_match",), "rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum")}
"""The figures that each metric gives."""
BatchSizes = Annotated[tuple[Annotated[Whole, Field(ge=1, le=4096)], ...], Field(min_length=1)]
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
    file: Place | None = None
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
        """Its name in progress and messages."""
        return self.name or Path(str(self.file)).stem


class AnswerSpec(Section):
    """Answers to instructions that the model has not been calibrated on: at most one of ``file`` and ``dataset``.

    Attributes:
        file: records as JSON, JSONL or Parquet; without ``file`` and ``dataset``, those that ship with quantkit.
        dataset: a hub data set, with ``config``, ``split`` and ``revision``.
        columns, tags: as of the calibration set; see :class:`quantkit.recipe.CalibrationSpec`.
        samples: records to answer; those of the calibration set are left out.
        seed: order in which records are drawn.
        max_new_tokens: tokens of an answer at most.
        metrics: ``exact_match``, ``rouge``, or the folder of a metric of Hugging Face ``evaluate``, which is Python
            code and runs only with ``model.trust_remote_code``.
    """

    file: Place | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    columns: Columns = Field(default_factory=dict)
    tags: Tags = Field(default_factory=dict)
    samples: Annotated[Whole, Field(ge=2)] = 64
    seed: Whole = 0
    max_new_tokens: Annotated[Whole, Field(ge=1)] = 64
    metrics: Annotated[tuple[str, ...], Field(min_length=1)] = ANSWER_METRICS

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str) else with_entry(given, "file", hub_key="dataset")

    @model_validator(mode="after")
    def _one_origin(self) -> AnswerSpec:
        if self.file is not None and self.dataset is not None:
            raise ValueError("give at most one of 'file' and 'dataset'")
        return self

    @field_validator("metrics")
    @classmethod
    def _metrics_are_known(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        require_distinct(list(metrics), "metrics")
        metrics = tuple(chosen(metric, ANSWER_METRICS) or metric for metric in metrics)
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


class SampleSpec(Section):
    """Prompts of which the report has what the float model and each file write after them: at most one origin.

    Attributes:
        prompts: what to give, each as a turn of the user's where the model has a chat template, else as it stands.
        file: the same, a line each of a ``.txt`` file, or records as JSON, JSONL or Parquet, up to their last answers.
        columns, tags: of records, as of the calibration set; see :class:`quantkit.recipe.CalibrationSpec`.
        count: how many at most; without one, all of ``prompts`` or ``file``, or :attr:`DRAWN` of the evaluation's own.
        max_new_tokens: tokens that are written after each at most.
    """

    DRAWN: ClassVar[int] = 5
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    file: Place | None = None
    columns: Columns = Field(default_factory=dict)
    tags: Tags = Field(default_factory=dict)
    count: Annotated[Whole, Field(ge=1)] | None = None
    max_new_tokens: Annotated[Whole, Field(ge=1)] = 12

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, given: Any) -> Any:
        if isinstance(given, bool):
            return {}
        keys: dict[type, str] = {str: "file", int: "count", list: "prompts", tuple: "prompts"}
        key = keys.get(type(given))
        return given if key is None else {key: given}

    @model_validator(mode="after")
    def _one_origin(self) -> SampleSpec:
        if self.prompts and self.file is not None:
            raise ValueError("give at most one of 'prompts' and 'file'")
        return self


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


class TextSpec(Section):
    """A text to score on: exactly one of ``bundled``, ``file`` and ``dataset``.

    Attributes:
        name: its name in the report, and in gates.
        bundled: ``prose`` or ``answers``, which ship with quantkit.
        file: a text file, or records as JSON, JSONL or Parquet.
        dataset: a hub data set, with ``config``, ``split``, ``column`` and ``revision``.
        columns, tags: of records, as of the calibration set; see :class:`quantkit.recipe.CalibrationSpec`.
    """

    name: Name
    bundled: Literal["prose", "answers"] | None = None
    file: Place | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "test"
    column: str = "text"
    columns: Columns = Field(default_factory=dict)
    tags: Tags = Field(default_factory=dict)
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, given: Any) -> Any:
        if isinstance(given, str):
            if (bundled := chosen(given, BUNDLED_TEXTS)) is not None:
                return {"name": bundled, "bundled": bundled}
            if "/" in given or "." in given:
                return {"name": named_after(Path(given).stem, "text"), "file": given}
            raise ValueError(f"unknown text '{given}': {did_you_mean(given, BUNDLED_TEXTS)}, or a file's path")
        return with_entry(given, "file", hub_key="dataset")

    @model_validator(mode="after")
    def _one_origin(self) -> TextSpec:
        if sum(origin is not None for origin in (self.bundled, self.file, self.dataset)) != 1:
            raise ValueError("give exactly one of 'bundled', 'file' and 'dataset'")
        return self


class ServedSpec(Section):
    """Every file scored once more, as a server computes with it, beside what the loader finds.

    Attributes:
        runtime: a runtime of another interpreter.
        python: that interpreter.
        dtype: compute dtype; ``auto`` is what the runtime takes by itself.
        batch_sizes: rows at once, for each of which speed is taken.
    """

    runtime: str = "vllm"
    python: Place | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    batch_sizes: BatchSizes = (1,)

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, given: Any) -> Any:
        return {"runtime": given} if isinstance(given, str) else {} if given is True else given

    @field_validator("runtime")
    @classmethod
    def _is_separate(cls, runtime: str) -> str:
        able = [each.name for each in RUNTIMES if each.separate]
        with located():
            found = RUNTIMES.name_of(runtime) if runtime in RUNTIMES else runtime
            if found not in able:
                raise RecipeError(f"'{found}' is no runtime with an interpreter of its own", did_you_mean(found, able))
        return found


class EvaluationSpec(Section):
    """How exported files are scored.

    Attributes:
        texts: what to score on.
        context_length: tokens per window; windows do not overlap.
        bos: where the beginning-of-sequence token stands, if the tokenizer puts one before every sequence: before each
            ``window``; once, before the ``stream`` that a text is, as in the literature; or nowhere.
        max_tokens: tokens scored per text at most.
        precision: a relative standard error: texts are scored in rounds until each file's mean divergence, and its
            perplexity over the float model's, are known so well; without it all texts are scored to ``max_tokens``.
        metrics: which figures to take.
        device: ``auto`` is CUDA where there is one.
        dtype: compute dtype; ``auto`` is float32 on CPU and the checkpoint's dtype on CUDA.
        reference_limit: bytes that the float model's stored log-probabilities may take, all texts together.
        loader: the runtime that loads the checkpoints: ``transformers`` loads the files as they are, ``reference``
            decodes them by quantkit's own formats into a float model, ``llama.cpp`` loads GGUF files, ``vllm`` has its
            own interpreter; ``whole`` is transformers or llama.cpp where they and the packages there can load the
            format, else the reference; ``streamed`` reads a block at a time, and ``auto`` does so where the whole would
            not fit.
        python: the interpreter of a runtime that has its own.
        batch_sizes: rows at once, for each of which speed is taken.
        tasks: of lm-evaluation-harness, each its name, the path of a task file, or a :class:`TaskSpec`.
        answers: instructions to answer; see :class:`AnswerSpec`.
        samples: continuations to read side by side, see :class:`SampleSpec`; a list of prompts, a file, a number, or
            ``false`` for none.
        served: score every file as a server computes with it, too; see :class:`ServedSpec`.
    """

    texts: Annotated[tuple[TextSpec, ...], Field(min_length=1)] = (
        TextSpec(name="prose", bundled="prose"),
        TextSpec(name="answers", bundled="answers"),
    )
    context_length: Annotated[Whole, Field(ge=16)] = 512
    bos: Bos = "window"
    max_tokens: Annotated[Whole, Field(ge=16)] = 8192
    precision: Annotated[float, Field(gt=0, lt=1)] | None = None
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = METRICS
    device: Device = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    reference_limit: Annotated[Whole, Field(ge=1 << 20)] = 8 << 30
    loader: str = AUTO
    python: Place | None = None
    batch_sizes: BatchSizes = (1,)
    tasks: tuple[TaskSpec, ...] = ()
    answers: AnswerSpec | None = None
    samples: SampleSpec | None = SampleSpec()
    served: ServedSpec | None = None

    @property
    def is_served(self) -> bool:
        """Whether the loader is a runtime of another interpreter."""
        return self.loader not in LOADERS and RUNTIMES.get(self.loader).separate

    @property
    def as_served(self) -> EvaluationSpec | None:
        """How files are scored as they are served; None where nobody asks for it. Nothing is continued to be read."""
        if self.served is None:
            return None
        told = {"loader": self.served.runtime, **self.served.model_dump(exclude={"runtime"})}
        return self.model_copy(update={**told, "samples": None, "served": None})

    @property
    def compares(self) -> bool:
        """Whether a metric needs the float model's log-probabilities."""
        return any(metric in COMPARING_METRICS for metric in self.metrics)

    @model_validator(mode="after")
    def _python_is_somebodys(self) -> EvaluationSpec:
        if self.python is not None and not self.is_served:
            raise ValueError(f"'python' is the interpreter of a runtime that has its own, and loader is {self.loader}")
        return self

    @model_validator(mode="after")
    def _precision_is_of_something(self) -> EvaluationSpec:
        if self.precision is not None and not {"perplexity", "kl_divergence"} & set(self.metrics):
            raise ValueError("'precision' is of perplexity or kl_divergence, and metrics has neither")
        return self

    @field_validator("samples", "served", mode="before")
    @classmethod
    def _none_where_off(cls, given: Any) -> Any:
        return None if given is False or (given == 0 and isinstance(given, int)) else given

    @field_validator("texts")
    @classmethod
    def _names_differ(cls, texts: tuple[TextSpec, ...]) -> tuple[TextSpec, ...]:
        require_distinct([text.name for text in texts], "texts")
        return texts

    @field_validator("tasks")
    @classmethod
    def _tasks_differ(cls, tasks: tuple[TaskSpec, ...]) -> tuple[TaskSpec, ...]:
        require_distinct([task.label for task in tasks], "tasks")
        return tasks

    @field_validator("loader")
    @classmethod
    def _loader_scores(cls, loader: str) -> str:
        if loader.casefold() in LOADERS:
            return loader.casefold()
        with located():
            if loader not in RUNTIMES:
                raise RecipeError(f"'{loader}' is not allowed", did_you_mean(loader, [*LOADERS, *RUNTIMES.names()]))
        return RUNTIMES.name_of(loader)

    @model_validator(mode="after")
    def _streamed_does_not_write(self) -> EvaluationSpec:
        if self.loader == STREAMED and self.answers is not None:
            with located():
                raise RecipeError(
                    "a model that is read a block at a time writes no answers: each token would read all its weights",
                    "leave out answers, or set loader: whole",
                )
        return self
