"""Questions with known answers: drawn, put to a model, its answers judged and compared with the float model's."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import records
from quantkit.errors import EvaluationError
from quantkit.evaluation.answer_metrics import Metric
from quantkit.evaluation.generation import continuation
from quantkit.evaluation.texts import BUNDLED_FILES, BUNDLED_FOLDER, MOST_REFUSED
from quantkit.recipe import AnswerSpec
from quantkit.records.dataset import records_sha256
from quantkit.runtimes.base import LoadedModel
from quantkit.system.artifacts import fingerprint, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MINIMUM = 2
"""Questions without which an error cannot be told."""
EXAMPLES = 5
"""Changed answers that the report shows."""
LONGEST_SHOWN = 1000
"""Characters of a text in the report; the file has all of it."""
Answer = dict[str, str]
"""``sha256`` and ``question``, ``expected`` and ``generated``; of a variant also ``float``, the float model's."""


@dataclass(frozen=True, slots=True)
class Question:
    """An instruction with its answer.

    Attributes:
        sha256: of the conversation up to the answer; see :func:`asked`.
        text: the last message before the answer.
        expected: the answer.
        prompt: token ids of the conversation up to the answer, as the chat template begins it.
    """

    sha256: str
    text: str
    expected: str
    prompt: list[int]


@dataclass(frozen=True, slots=True)
class Questions:
    """Questions in the order in which they are asked.

    Attributes:
        items: the questions.
        origin: of the data set, as JSON data.
        left_out: how many records were not used, by reason, as far as they were looked at.
    """

    items: list[Question]
    origin: dict[str, Any]
    left_out: dict[str, int]

    def facts(self) -> dict[str, Any]:
        """For the record: how many there are, whence they come, and what was left out."""
        return {"questions": len(self.items), "dataset": self.origin, "left_out": self.left_out}


def asked(record: records.Record) -> Iterator[str]:
    """The SHA-256 of each beginning of a conversation that ends before an answer, as :class:`Question` has it."""
    for place, message in enumerate(record.messages):
        if place and message.role == "assistant":
            yield records_sha256([records.Record(messages=record.messages[:place])])


def load_questions(
    spec: AnswerSpec, tokenizer: PreTrainedTokenizerBase, seen: Collection[str], longest: int
) -> Questions:
    """Draw questions until there are as many as wanted, or no record is left.

    Args:
        spec: the recipe's section.
        tokenizer: the model's; its chat template writes the prompts.
        seen: what the model was calibrated on, as :func:`asked` gives it.
        longest: tokens of prompt and answer together at most.

    Raises:
        CalibrationError: the data set cannot be read, or the chat template fails.
        EvaluationError: fewer than two questions are left.
    """
    given = _read(spec)
    found = records.without_images(given)
    indices = found.indices()
    items: list[Question] = []
    refused: list[records.RefusedRecordError] = []
    left_out = dict.fromkeys(("no question with an answer", "in the calibration set", "too long"), 0)
    if found is not given:
        left_out["has images"] = len(given.records) - len(found.records)
    for place in random.Random(spec.seed).sample(range(len(indices)), len(indices)):
        if len(items) == spec.samples:
            break
        record = found.records[place]
        if len(record.messages) < MINIMUM or record.messages[-1].role != "assistant":
            left_out["no question with an answer"] += 1
            continue
        try:
            question = question_of(record, tokenizer, indices[place])
        except records.RefusedRecordError as error:
            refused.append(error)
            if error.ended or (not items and len(refused) >= MOST_REFUSED):
                raise
            continue
        if question.sha256 in seen:
            left_out["in the calibration set"] += 1
        elif len(question.prompt) + spec.max_new_tokens > longest:
            left_out["too long"] += 1
        else:
            items.append(question)
    if refused and not items:
        raise refused[0]
    left_out = {reason: count for reason, count in left_out.items() if count}
    if refused:
        left_out["refused by the chat template"] = len(refused)
    if len(items) < MINIMUM:
        reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items()) or "there are no more"
        raise EvaluationError(
            f"evaluation.answers: {len(items)} of the {len(indices)} records of {found.name} can be asked: {reasons}",
            "give a data set of instructions with answers that the model is not calibrated on",
        )
    return Questions(items, found.origin, left_out)


def question_of(record: records.Record, tokenizer: PreTrainedTokenizerBase, index: int | None = None) -> Question:
    """A record up to its last answer, which is empty where it ends without one; of a plain text all.

    Args:
        record: a conversation, or a plain text.
        tokenizer: the model's; its chat template writes the prompt.
        index: the record's, for messages.

    Raises:
        CalibrationError: the chat template fails.
    """
    turns, answer = record.messages, ""
    if len(turns) >= MINIMUM and turns[-1].role == "assistant":
        turns, answer = turns[:-1], turns[-1].content
    begun = records.Record(messages=turns, text=record.text)
    prompt = records.encode(begun, tokenizer, index=index, awaits_answer=True)
    return Question(records_sha256([begun]), record.text or turns[-1].content, answer, prompt)


def _read(spec: AnswerSpec) -> records.RecordSet:
    if spec.dataset is not None:
        return records.read_hub(
            spec.dataset,
            config=spec.config,
            split=spec.split,
            revision=spec.revision,
            columns=spec.columns or None,
            tags=spec.tags,
        )
    if spec.file is not None:
        return records.read_reference(spec.file, spec.columns, spec.tags)
    return records.read_file(BUNDLED_FOLDER / BUNDLED_FILES["answers"])


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
    on_answer(0, len(questions))
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
