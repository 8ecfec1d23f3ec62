"""Put questions to a model, compare its answers with the expected ones and with the float model's, and keep them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import EvaluationError
from quantkit.evaluation.answer_metrics import Metric
from quantkit.evaluation.generation import continuation
from quantkit.evaluation.questions import Question
from quantkit.recipe import AnswerSpec
from quantkit.runtimes.base import LoadedModel
from quantkit.system.artifacts import fingerprint, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 5
"""Changed answers that the report shows."""
LONGEST_SHOWN = 1000
"""Characters of a text in the report; the file has all of it."""
Answer = dict[str, str]
"""``sha256`` and ``question``, ``expected`` and ``generated``; of a variant also ``float``, the float model's."""


def answer(
    model: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    spec: AnswerSpec,
    ends: frozenset[int],
    on_answer: Callable[[int, int], None],
) -> list[Answer]:
    """The model's answers, greedily, up to the end of its turn or ``spec.max_new_tokens``."""
    answers = []
    for done, question in enumerate(questions, start=1):
        text = continuation(model, tokenizer, question.prompt, spec.max_new_tokens, ends=ends)
        answers.append(
            {"sha256": question.sha256, "question": question.text, "expected": question.expected, "generated": text}
        )
        on_answer(done, len(questions))
    return answers


def judged(answers: Sequence[Answer], metrics: Sequence[Metric]) -> dict[str, Any]:
    """The figures of all metrics: ``value``, ``stderr``, ``samples`` and ``prompts_checksum``, as those of tasks."""
    given, expected = ([each[key] for each in answers] for key in ("generated", "expected"))
    found: dict[str, Any] = {}
    for metric in metrics:
        found |= metric(given, expected)
    checksum = int(fingerprint([[each["sha256"], each["expected"]] for each in answers])[:12], 16)
    return {name: {**figure, "prompts_checksum": checksum} for name, figure in found.items()}


def beside_float(answers: Sequence[Answer], file: Path) -> list[Answer]:
    """The answers, each with that of the float model.

    Raises:
        EvaluationError: the float model was not asked the same.
    """
    told = {each["sha256"]: each["generated"] for each in read_answers(file)}
    missing = [each for each in answers if each["sha256"] not in told]
    if missing:
        raise EvaluationError(f"{file} lacks {len(missing)} of the questions", "score the float model again")
    return [{**each, "float": told[each["sha256"]]} for each in answers]


def changes(answers: Sequence[Answer]) -> dict[str, Any]:
    """How many answers are not the float model's, and some of them."""
    differing = [each for each in answers if each["float"] != each["generated"]]
    shown = [{key: text[:LONGEST_SHOWN] for key, text in each.items()} for each in differing[:EXAMPLES]]
    return {"changed": len(differing), "examples": shown}


def write_answers(file: Path, answers: Sequence[Mapping[str, str]]) -> None:
    """Write answers as JSON lines.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text(file, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in answers))


def read_answers(file: Path) -> list[Answer]:
    """Read answers again.

    Raises:
        EvaluationError: they are missing or damaged.
    """
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{file} cannot be read: {error}", "score the float model again") from error
