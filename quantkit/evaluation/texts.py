"""The texts to score on: read, turned into tokens, and cut into windows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit import records
from quantkit.calibration.model import added_bos
from quantkit.errors import EvaluationError
from quantkit.recipe import TextSpec
from quantkit.recipe.evaluation import Bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED_FOLDER = Path(__file__).parent.parent / "eval_data"
BUNDLED_FILES = {"prose": "prose.txt", "answers": "answers.jsonl"}
DOCUMENT_SEPARATOR = "\n\n"
TEMPLATE = "auto"
CHARACTERS_PER_TOKEN = 16
CONVERSATIONS = 32
MOST_REFUSED = 32
"""Records that a chat template may refuse one after another from the first, before it is taken to refuse all."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The beginning of a text as one stream of tokens.

    Attributes:
        name: the text.
        ids: token ids, without the BOS that the tokenizer would add to a whole sequence.
        bos: id of the BOS token if the tokenizer puts it before every sequence by itself, else None.
        skipped_records: rows of the text's file or data set that hold nothing to score on.
        conversations: the first :data:`CONVERSATIONS` of it that are no plain texts.
    """

    name: str
    ids: list[int]
    bos: int | None
    skipped_records: int = 0
    conversations: tuple[records.Record, ...] = ()


def load_text(spec: TextSpec, tokenizer: PreTrainedTokenizerBase, limit: int) -> Tokens:
    """Read a text and tokenize it, up to ``limit`` tokens.

    Conversations are rendered by the model's chat template, and their tokens follow one another. Where all
    is plain text, or the model has no template, documents are joined by two newlines and tokenized as one
    stream without special tokens; blank rows of a data set count as documents. For the WikiText-2 test split this is
    the text of GPTQ's protocol (arXiv:2210.17323), whose windows :func:`cut` makes with ``bos="stream"``.

    Raises:
        CalibrationError: the file or data set cannot be read, or the chat template fails.
        EvaluationError: the text has no tokens.
    """
    found = records.without_images(_read(spec))
    templated = records.template_text(TEMPLATE, tokenizer) is not None
    if templated and any(record.messages for record in found.records):
        ids, refused = _encode_beginning(found, tokenizer, limit)
        skipped = len(found.skipped) + refused
    else:
        documents, skipped = _documents(found, tokenizer, spec.columns.get("text", spec.column))
        ids = _tokenize_beginning(DOCUMENT_SEPARATOR.join(documents), tokenizer, limit)
    if not ids:
        raise EvaluationError(f"text '{spec.name}' has no tokens", "give a text of a few hundred words")
    conversations = tuple(islice((record for record in found.records if record.messages), CONVERSATIONS))
    return Tokens(spec.name, ids[:limit], added_bos(tokenizer), skipped, conversations)


def _read(spec: TextSpec) -> records.RecordSet:
    if spec.bundled is not None:
        return records.read_file(BUNDLED_FOLDER / BUNDLED_FILES[spec.bundled])
    if spec.file is not None:
        return records.read_reference(spec.file, spec.columns, spec.tags)
    if spec.dataset is None:
        raise ValueError(f"text '{spec.name}' has no origin")
    named = bool(spec.columns or spec.tags)
    return records.read_hub(
        spec.dataset,
        config=spec.config,
        split=spec.split,
        revision=spec.revision,
        columns=(spec.columns or None) if named else {"text": spec.column},
        tags=spec.tags,
        others=named,
    )


def _documents(found: records.RecordSet, tokenizer: PreTrainedTokenizerBase, column: str) -> tuple[list[str], int]:
    """The documents in order, rows with a blank column among them, and how many rows are unusable otherwise."""
    by_index = {
        index: records.render(record, tokenizer, TEMPLATE, index=index)
        for index, record in zip(found.indices(), found.records, strict=True)
    }
    blank = {row.index: "" for row in found.skipped if row.reason == f"'{column}' is empty"}
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


def _encode_beginning(
    found: records.RecordSet, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[int], int]:
    """The first tokens of the conversations that the chat template takes, and how many it refuses among them.

    Raises:
        RefusedRecordError: it refuses all of them; of the first.
    """
    ids: list[int] = []
    refused: list[records.RefusedRecordError] = []
    for record, index in zip(found.records, found.indices(), strict=True):
        try:
            ids.extend(records.encode(record, tokenizer, TEMPLATE, index=index))
        except records.RefusedRecordError as error:
            refused.append(error)
            if error.ended or (not ids and len(refused) >= MOST_REFUSED):
                break
        if len(ids) >= limit:
            break
    if refused and not ids:
        raise refused[0]
    return ids, len(refused)


@dataclass(frozen=True, slots=True)
class Windows:
    """Non-overlapping windows of one text, all of the same length.

    Attributes:
        name: the text.
        ids: int64 ``[windows, length]`` as they are fed to the model.
        context_length: the length that was asked for; ``length`` is less only for a text shorter than that.
        bos: where BOS is: in the first slot of each ``window``, in that of the first one, or nowhere.
        tokens: tokens of the text in the windows.
        dropped: tokens of the partial window at the end, which is not scored.
        skipped_records: rows of the text's file or data set that hold nothing to score on.
    """

    name: str
    ids: torch.Tensor
    context_length: int
    bos: Bos
    tokens: int
    dropped: int
    skipped_records: int = 0

    @property
    def scored_per_window(self) -> int:
        """Scored positions in one window: all but the first."""
        return self.ids.shape[1] - 1

    @property
    def positions(self) -> int:
        """Scored positions in all windows."""
        return self.ids.shape[0] * self.scored_per_window

    @property
    def sha256(self) -> str:
        """SHA-256 over length and ids of the windows as little-endian int64, BOS included."""
        array = self.ids.contiguous().numpy().astype("<i8", copy=False)
        return hashlib.sha256(array.shape[1].to_bytes(8, "little") + array.tobytes()).hexdigest()

    def after(self, count: int) -> Windows:
        """The windows after the first ``count``."""
        return replace(self, ids=self.ids[count:])

    def facts(self) -> dict[str, Any]:
        """How the text was cut, for the record."""
        return {
            "definition": definition(self.context_length, self.bos),
            "context_length": self.context_length,
            "stride": self.context_length,
            "bos": self.bos,
            "tokens": self.tokens,
            "windows": self.ids.shape[0],
            "token_ids_sha256": self.sha256,
            "dropped_tokens": self.dropped,
            "skipped_records": self.skipped_records,
        }


BEGINNINGS: dict[Bos, str] = {
    "window": " of which the first is the beginning-of-sequence token",
    "stream": " of a stream that begins with the beginning-of-sequence token",
    "none": "",
}


def definition(context_length: int, bos: Bos) -> str:
    """One sentence that says how perplexity is computed."""
    return (
        f"exp of the mean negative log-likelihood per token, over non-overlapping windows of {context_length} tokens"
        f"{BEGINNINGS[bos]}; every token but a window's first is predicted from those before it in the window"
    )


def cut(tokens: Tokens, context_length: int, max_tokens: int, bos: Bos = "window") -> Windows:
    """Cut at most ``max_tokens`` tokens of a text into windows of ``context_length``.

    Where the tokenizer adds BOS by itself, ``bos`` says what becomes of it. With ``window`` each window is BOS and
    ``context_length - 1`` tokens of the text. With ``stream`` the windows are cut from BOS and the text after it, which
    are what the tokenizer gives for the whole text: so GPTQ (arXiv:2210.17323) and those after it take perplexity.
    A partial window at the end is dropped, unless it is the only one.

    Raises:
        EvaluationError: the text is too short for a single scored token.
    """
    bos = "none" if tokens.bos is None else bos
    start, head = ([] if tokens.bos is None or bos != place else [tokens.bos] for place in ("window", "stream"))
    per_window = context_length - len(start)
    ids = (head + tokens.ids)[:max_tokens]
    if len(ids) + len(start) < 2:
        raise EvaluationError(
            f"text '{tokens.name}' has {len(tokens.ids)} tokens, too few to score", "give a text of a few hundred words"
        )
    per_window = min(per_window, len(ids))
    count = len(ids) // per_window
    used = count * per_window
    body = torch.tensor(ids[:used], dtype=torch.int64).view(count, per_window)
    first = torch.tensor(start, dtype=torch.int64).expand(count, len(start))
    return Windows(
        name=tokens.name,
        ids=torch.cat([first, body], dim=1),
        context_length=context_length,
        bos=bos,
        tokens=used - len(head),
        dropped=len(ids) - used,
        skipped_records=tokens.skipped_records,
    )
