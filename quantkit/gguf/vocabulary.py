"""The tokens of a GGUF file with their types."""

from __future__ import annotations

from dataclasses import dataclass

NORMAL, UNKNOWN, UNUSED, BYTE = 1, 2, 5, 6
"""Types of tokens beside those of ``source.gguf_tokenizer``, as ``llama.h`` of llama.cpp numbers them."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Every row of the embedding.

    Attributes:
        tokens: the texts.
        kinds: the type of each.
    """

    tokens: list[str]
    kinds: list[int]
