"""The vocabulary of a sentencepiece tokenizer as GGUF files hold it: a score for each token in place of merges."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from quantkit.errors import SourceError
from quantkit.gguf.metadata import OTHER_FORMAT
from quantkit.gguf.tokenizer_in import SPACE
from quantkit.gguf.vocabulary import BYTE, NORMAL, UNKNOWN, Vocabulary

SPACES = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
"""The normalizer of tokenizers that put a space before every text, as llama.cpp does."""
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def sentencepiece_metadata(backend: dict[str, Any], vocabulary: Vocabulary, folder: Path) -> dict[str, Any]:
    """The keys of a sentencepiece BPE with bytes to fall back on.

    Args:
        backend: the parsed ``tokenizer.json``.
        vocabulary: with the types of added tokens.
        folder: of the model, for messages.

    Raises:
        SourceError: spaces are treated as llama.cpp does not, or the merges do not follow from scores.
    """
    if not (puts_space_before_text(backend) or puts_space_before_first_text(backend)):
        raise SourceError(f"{folder}: the tokenizer puts spaces where llama.cpp does not", OTHER_FORMAT)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in backend["model"]["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    unknown = backend["model"].get("unk_token")
    kinds = [
        UNKNOWN if token == unknown else BYTE if BYTE_TOKEN.fullmatch(token) else kind
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    ]
    normal = {token for token, kind in zip(vocabulary.tokens, kinds, strict=True) if kind == NORMAL}
    if _splits(normal) != {(left, right) for left, right in merges if {left, right, left + right} <= normal}:
        raise SourceError(f"{folder}: the tokenizer's merges are not those of a sentencepiece model", OTHER_FORMAT)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [float(-ranks.get(token, len(merges))) for token in vocabulary.tokens],
        "tokenizer.ggml.add_space_prefix": True,
    }


def puts_space_before_text(backend: dict[str, Any]) -> bool:
    """Whether a space comes before every text between special tokens, as in llama.cpp."""
    return backend.get("normalizer") == SPACES and backend.get("pre_tokenizer") is None


def puts_space_before_first_text(backend: dict[str, Any]) -> bool:
    """Whether a space comes before a text that has none, and not after special tokens; llama.cpp puts them there."""
    pieces = backend.get("pre_tokenizer") or {}
    return backend.get("normalizer") is None and (
        pieces.get("type") == "Metaspace"
        and pieces.get("replacement") == SPACE
        and pieces.get("prepend_scheme") in ("first", "always")
        and not pieces.get("split", True)
    )


def _splits(known: Collection[str]) -> set[tuple[str, str]]:
    """Every way to make a token of two."""
    return {
        (token[:place], token[place:])
        for token in known
        for place in range(1, len(token))
        if token[:place] in known and token[place:] in known
    }
