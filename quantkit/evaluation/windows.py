"""Cut a text's tokens into the windows on which a model is scored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.errors import EvaluationError
from quantkit.evaluation.texts import Tokens


@dataclass(frozen=True, slots=True)
class Windows:
    """Non-overlapping windows of one text, all of the same length.

    Attributes:
        name: the text.
        ids: int64 ``[windows, length]`` as they are fed to the model.
        context_length: the length that was asked for; ``length`` is less only for a text shorter than that.
        bos: the first slot of each window holds BOS instead of a token of the text.
        tokens: tokens of the text in the windows.
        dropped: tokens of the partial window at the end, which is not scored.
        skipped_records: rows of the text's file or data set that hold nothing to score on.
    """

    name: str
    ids: torch.Tensor
    context_length: int
    bos: bool
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


def definition(context_length: int, bos: bool) -> str:
    """One sentence that says how perplexity is computed."""
    start = " of which the first is the beginning-of-sequence token" if bos else ""
    return (
        f"exp of the mean negative log-likelihood per token, over non-overlapping windows of {context_length} tokens"
        f"{start}; every token but a window's first is predicted from those before it in the window"
    )


def cut(tokens: Tokens, context_length: int, max_tokens: int) -> Windows:
    """Cut at most ``max_tokens`` tokens of a text into windows of ``context_length``.

    Where the tokenizer adds BOS by itself, each window is BOS and ``context_length - 1`` tokens of the text.
    A partial window at the end is dropped, unless it is the only one.

    Raises:
        EvaluationError: the text is too short for a single scored token.
    """
    start = [] if tokens.bos is None else [tokens.bos]
    per_window = context_length - len(start)
    ids = tokens.ids[:max_tokens]
    if len(ids) + len(start) < 2:
        raise EvaluationError(
            f"text '{tokens.name}' has {len(ids)} tokens, too few to score", "give a text of a few hundred words"
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
        bos=bool(start),
        tokens=used,
        dropped=len(ids) - used,
        skipped_records=tokens.skipped_records,
    )
