"""Read the texts to score on, and turn them into tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit import records
from quantkit.errors import EvaluationError
from quantkit.recipe import TextSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED_FOLDER = Path(__file__).parent.parent / "eval_data"
BUNDLED_FILES = {"prose": "prose.txt", "answers": "answers.jsonl"}
DOCUMENT_SEPARATOR = "\n\n"
TEMPLATE = "auto"
BLANK_ROW = "'text' is empty"
CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Tokens:
    """The beginning of a text as one stream of tokens.

    Attributes:
        name: the text.
        ids: token ids, without the BOS that the tokenizer would add to a whole sequence.
        bos: id of the BOS token if the tokenizer puts it before every sequence by itself, else None.
        skipped_records: rows of the text's file or data set that hold nothing to score on.
    """

    name: str
    ids: list[int]
    bos: int | None
    skipped_records: int = 0


def load_text(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, limit: int) -> Tokens:
    """Read a text and tokenize it, up to ``limit`` tokens.

    Conversations are rendered by the model's chat template, and their tokens follow one another. Where all
    is plain text, or the model has no template, documents are joined by two newlines and tokenized as one
    stream without special tokens; blank rows of a data set count as documents, so that for the WikiText-2
    test split this is the protocol of GPTQ (arXiv:2210.17323).

    Raises:
        CalibrationError: the file or data set cannot be read, or the chat template fails.
        EvaluationError: the text has no tokens.
    """
    found = _read(spec)
    templated = records.template_text(TEMPLATE, tokenizer) is not None
    if templated and any(record.messages for record in found.records):
        ids = _encode_beginning(found.records, tokenizer, limit)
        skipped = len(found.skipped)
    else:
        documents, skipped = _documents(found, tokenizer)
        ids = _tokenize_beginning(DOCUMENT_SEPARATOR.join(documents), tokenizer, limit)
    if not ids:
        raise EvaluationError(f"text '{spec.name}' has no tokens", "give a text of a few hundred words")
    return Tokens(spec.name, ids[:limit], added_bos(tokenizer), skipped)


def added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of BOS if the tokenizer begins every sequence with it by default, else None."""
    bos: int | None = tokenizer.bos_token_id
    begins = tokenizer("x").input_ids[:1]
    return bos if bos is not None and begins == [bos] else None


def _read(spec: TextSpec) -> records.RecordSet:
    if spec.bundled is not None:
        return records.read_file(BUNDLED_FOLDER / BUNDLED_FILES[spec.bundled])
    if spec.file is not None:
        return records.read_file(Path(spec.file))
    if spec.dataset is None:
        raise ValueError(f"text '{spec.name}' has no origin")
    return records.read_hub(
        spec.dataset, config=spec.config, split=spec.split, revision=spec.revision, columns={"text": spec.column}
    )


def _documents(found: records.RecordSet, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], int]:
    """The documents in order, blank rows among them, and the number of rows that are unusable otherwise."""
    by_index = {
        index: records.render(record, tokenizer, TEMPLATE, index=index)
        for index, record in zip(found.indices(), found.records, strict=True)
    }
    blank = {row.index: "" for row in found.skipped if row.reason == BLANK_ROW}
    every = by_index | blank
    return [every[index] for index in sorted(every)], len(found.skipped) - len(blank)


def _tokenize_beginning(text: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[int]:
    """The first tokens of a text, at least ``limit`` of them if it has as many.

    A long text is not tokenized to its end: where it is cut can only change tokens near the cut, so the
    beginning is doubled until its tokens reach twice as far as they are needed.
    """
    length = CHARACTERS_PER_TOKEN * limit
    while True:
        ids: list[int] = tokenizer(text[:length], add_special_tokens=False, verbose=False).input_ids
        if length >= len(text) or len(ids) >= 2 * limit:
            return ids
        length *= 2


def _encode_beginning(found: list[records.Record], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[int]:
    ids: list[int] = []
    for record in found:
        ids.extend(records.encode(record, tokenizer, TEMPLATE))
        if len(ids) >= limit:
            break
    return ids
