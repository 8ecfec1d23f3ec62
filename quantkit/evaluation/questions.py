"""The questions that are put to a model: instructions with known answers, none of them from the calibration set."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import records
from quantkit.errors import EvaluationError
from quantkit.evaluation.texts import BUNDLED_FILES, BUNDLED_FOLDER
from quantkit.recipe import AnswerSpec
from quantkit.records.dataset import records_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MINIMUM = 2
"""Questions without which an error cannot be told."""


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
    found = _read(spec)
    indices = found.indices()
    items: list[Question] = []
    left_out = dict.fromkeys(("no question with an answer", "in the calibration set", "too long"), 0)
    for place in random.Random(spec.seed).sample(range(len(indices)), len(indices)):
        if len(items) == spec.samples:
            break
        record = found.records[place]
        if len(record.messages) < MINIMUM or record.messages[-1].role != "assistant":
            left_out["no question with an answer"] += 1
            continue
        question = _question(record, tokenizer, indices[place])
        if question.sha256 in seen:
            left_out["in the calibration set"] += 1
        elif len(question.prompt) + spec.max_new_tokens > longest:
            left_out["too long"] += 1
        else:
            items.append(question)
    left_out = {reason: count for reason, count in left_out.items() if count}
    if len(items) < MINIMUM:
        reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items()) or "there are no more"
        raise EvaluationError(
            f"evaluation.answers: {len(items)} of the {len(indices)} records of {found.name} can be asked: {reasons}",
            "give a data set of instructions with answers that the model is not calibrated on",
        )
    return Questions(items, found.origin, left_out)


def _question(record: records.Record, tokenizer: PreTrainedTokenizerBase, index: int) -> Question:
    *before, answer = record.messages
    begun = records.Record(messages=tuple(before))
    prompt = records.encode_question(begun, tokenizer, index=index)
    return Question(records_sha256([begun]), before[-1].content, answer.content, prompt)


def _read(spec: AnswerSpec) -> records.RecordSet:
    if spec.dataset is not None:
        return records.read_hub(spec.dataset, config=spec.config, split=spec.split, revision=spec.revision)
    return records.read_file(Path(spec.file) if spec.file else BUNDLED_FOLDER / BUNDLED_FILES["answers"])
