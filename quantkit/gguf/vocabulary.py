"""The tokens of a GGUF file with their types, and the special ones among them."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from quantkit.errors import SourceError
from quantkit.gguf.head import GIVE_FLOAT, GGUFHead

SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Special tokens: what transformers calls them, and keys of the metadata."""


class TokenType(IntEnum):
    """Types of tokens, as ``llama.h`` of llama.cpp numbers them.

    ``CONTROL`` are the special ones, ``USER_DEFINED`` others that are found in a text before it is split.
    """

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def embedding_rows(head: GGUFHead) -> int:
    """Rows of the embedding, of which each token has one.

    Raises:
        SourceError: there is no embedding.
    """
    embedding = head.tensors.get("token_embd.weight")
    if embedding is None:
        raise SourceError(f"{head.path} has no tensor 'token_embd.weight'", "is this a language model?")
    return embedding.shape[0]


def special_ids(head: GGUFHead) -> dict[str, Any]:
    """The ids of the special tokens as configs name them, None for those that the file does not name.

    Raises:
        SourceError: an id is not one of the vocabulary.
    """
    ids = {
        f"{token}_id": head.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for token, key in SPECIAL.items()
        if token != "unk_token"
    }
    rows = embedding_rows(head)
    for name, number in ids.items():
        if number is not None and not (isinstance(number, int) and 0 <= number < rows):
            raise SourceError(f"{head.path}: {name} {number!r} is not in the vocabulary of {rows}", GIVE_FLOAT)
    return ids


def check_vocabulary(head: GGUFHead) -> None:
    """Check what a tokenizer is built from, whose builders do not say what is wrong with it.

    Raises:
        SourceError: tokens, types, scores, merges or the chat template are broken.
    """
    tokens = _strings(head, "tokenizer.ggml.tokens")
    rows = embedding_rows(head)
    if len(tokens) > rows:
        raise SourceError(f"{head.path}: it has {len(tokens)} tokens for {rows} rows of weights", GIVE_FLOAT)
    if len(set(tokens)) < len(tokens):
        raise SourceError(f"{head.path}: the vocabulary holds a token twice", GIVE_FLOAT)
    for name in SPECIAL.values():
        number = head.metadata.get(f"tokenizer.ggml.{name}_token_id", 0)
        if type(number) is not int or not 0 <= number < len(tokens):
            raise SourceError(f"{head.path}: the {name} token {number!r} is not in the vocabulary", GIVE_FLOAT)
    kinds = head.metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(kinds, list) or len(kinds) not in (0, len(tokens)):
        raise SourceError(f"{head.path}: its token_type is not a number for each of {len(tokens)} tokens", GIVE_FLOAT)
    for name in ("add_bos_token", "add_eos_token"):
        if not isinstance(head.metadata.get(f"tokenizer.ggml.{name}", False), bool):
            raise SourceError(f"{head.path}: its {name} is not true or false", GIVE_FLOAT)
    template = head.metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise SourceError(f"{head.path}: the chat template is not text", GIVE_FLOAT)
    if head.metadata["tokenizer.ggml.model"] == "gpt2":
        _check_merges(head, set(tokens))
        return
    scores = head.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise SourceError(f"{head.path}: the vocabulary does not have a score for each token", GIVE_FLOAT)


def _check_merges(head: GGUFHead, known: set[str]) -> None:
    for merge in _strings(head, "tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not (space and left in known and right in known and left + right in known):
            raise SourceError(f"{head.path}: the merge {merge!r} joins what is not in the vocabulary", GIVE_FLOAT)


def _strings(head: GGUFHead, key: str) -> list[str]:
    value = head.metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise SourceError(f"{head.path}: the metadata key '{key}' is not a list of texts", GIVE_FLOAT)
    return value
