"""Tasks, answers and samples of a job: prepared before its model is loaded, taken after its texts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantkit.evaluation import answers
from quantkit.evaluation.answer_metrics import Metric, answer_metric
from quantkit.evaluation.answers import Questions, load_questions
from quantkit.evaluation.generation import end_tokens
from quantkit.evaluation.job import EvaluationJob, Progress
from quantkit.evaluation.samples import Prompts, sample_prompts, samples
from quantkit.evaluation.tasks import LoadedTask, loaded_tasks, score_tasks
from quantkit.evaluation.texts import Windows
from quantkit.records import Record
from quantkit.runtimes.base import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

UNLIMITED = 1 << 30
WRITING = "generate_until"
"""What lm-evaluation-harness calls the kind of tasks whose answers the model writes."""


@dataclass(frozen=True)
class TasksAndAnswers:
    """The tasks and the questions of a job, with all that scoring them takes.

    Attributes:
        job: the job.
        tokenizer, ends: the model's, and the ids that end its texts.
        longest: tokens that the model reads at most.
        tasks: with their data.
        questions, metrics: to answer, and to judge the answers by; None and empty where the job does not ask.
    """

    job: EvaluationJob
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    longest: int
    tasks: list[LoadedTask]
    questions: Questions | None
    metrics: tuple[Metric, ...]

    @property
    def context_length(self) -> int:
        """Tokens that the runtime has to have room for."""
        needed = [min(task.spec.max_length, self.longest) for task in self.tasks]
        if self.questions is not None and self.job.spec.answers is not None:
            longest = max(len(question.prompt) for question in self.questions.items)
            needed.append(longest + self.job.spec.answers.max_new_tokens)
        return max(needed, default=0)

    def without_writing(self) -> tuple[TasksAndAnswers, list[str]]:
        """What of them can be had from a model that does not write, and the names of all that cannot."""
        write = [task for task in self.tasks if any(each.OUTPUT_TYPE == WRITING for each in _plain(task))]
        left = [*(f"task {task.spec.label}" for task in write), *(["answers"] if self.questions is not None else [])]
        left += ["samples"] if self.job.spec.samples is not None else []
        job = replace(self.job, spec=self.job.spec.model_copy(update={"samples": None}))
        kept = [task for task in self.tasks if task not in write]
        return replace(self, job=job, tasks=kept, questions=None), left

    def score(self, model: LoadedModel, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
        """Take the scores.

        Returns:
            ``tasks``, ``task_losses`` and ``answers`` for the metrics of a result; and facts of ``tasks`` and
            ``answers`` for the result itself.

        Raises:
            EvaluationError: a task or an answer cannot be scored.
            OutputError: the answers cannot be written.
        """
        metrics, facts = score_tasks(self.tasks, model, self.tokenizer, self.ends, self.longest, progress)
        told: dict[str, Any] = {"tasks": facts} if facts else {}
        if self.questions is not None:
            metrics["answers"], told["answers"] = self._answer(model, self.questions, progress)
        return metrics, told

    def prompts(self, conversations: Mapping[str, Sequence[Record]], windows: Mapping[str, Windows]) -> Prompts | None:
        """What the model is given to continue; None where the job does not ask.

        Raises:
            EvaluationError, CalibrationError: see :func:`quantkit.evaluation.samples.sample_prompts`.
        """
        if self.job.spec.samples is None:
            return None
        asked = self.questions.items if self.questions is not None else []
        return sample_prompts(
            self.job.spec.samples,
            self.tokenizer,
            self.longest,
            questions=asked,
            conversations=conversations,
            windows=windows,
        )

    def samples(self, model: LoadedModel, prompts: Prompts, progress: Progress) -> dict[str, Any]:
        """What the model writes after them, see :func:`quantkit.evaluation.samples.samples`."""
        beside = self.job.float_samples
        return samples(model, self.tokenizer, prompts, self.ends, beside, _named(progress, "samples"))

    def _answer(
        self, model: LoadedModel, questions: Questions, progress: Progress
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        spec, job = self.job.spec.answers, self.job
        if spec is None:
            raise ValueError("there are questions and no section that asks for answers")
        given = answers.answer(model, self.tokenizer, questions.items, spec, self.ends, _named(progress, "answers"))
        facts = questions.facts()
        if job.float_answers is not None:
            given = answers.beside_float(given, job.float_answers)
            facts |= answers.changes(given)
        if job.answers_file is not None:
            answers.write_answers(job.answers_file, given)
        return answers.judged(given, self.metrics), facts


@contextmanager
def tasks_and_answers(
    job: EvaluationJob, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[TasksAndAnswers]:
    """Prepare the tasks and the questions of a job, before its model is loaded.

    Raises:
        MissingDependencyError: a package for it is not installed.
        EvaluationError: a task or a metric cannot be had, or no question is left.
        CalibrationError: the questions cannot be read.
    """
    spec, trusted = job.spec.answers, job.trust_remote_code
    longest = getattr(config, "max_position_embeddings", None) or UNLIMITED
    questions = None if spec is None else load_questions(spec, tokenizer, frozenset(job.seen), longest)
    metrics = () if spec is None else tuple(answer_metric(name, trusted=trusted) for name in spec.metrics)
    ends = end_tokens(job.checkpoint, config, tokenizer)
    with loaded_tasks(job.spec.tasks, trusted=trusted) as tasks:
        yield TasksAndAnswers(job, tokenizer, ends, longest, tasks, questions, metrics)


def _plain(task: LoadedTask) -> Collection[Any]:
    """The tasks of an entry, which may be a group."""
    found: Mapping[str, Any] = task.content["tasks"]
    return found.values()


def _named(progress: Progress, step: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(step, done, total)
