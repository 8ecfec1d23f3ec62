"""What tokenizers do to text before their merges, as GGUF files say it: byte-level ones split it, others put spaces.

The tables serve both ways: a file's name of a splitting is turned into a pre-tokenizer, and a tokenizer's own
pre-tokenizer into the name to write. The names are those of ``llama-vocab.cpp`` in
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers

SPACE = "▁"
"""How sentencepiece writes a space."""
SPACED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
"""The normalizer that :func:`space_before_text` sets, as ``tokenizer.json`` says it."""


def space_before_text(tokenizer: Any) -> None:
    """Set a sentencepiece ``tokenizers.Tokenizer`` up to put a space before every text, as llama.cpp does."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.pre_tokenizer = None


def puts_space_before_text(backend: Mapping[str, Any]) -> bool:
    """Whether a parsed ``tokenizer.json`` puts a space before every text between special tokens, as in llama.cpp."""
    return backend.get("normalizer") == SPACED and backend.get("pre_tokenizer") is None


def puts_space_before_first_text(backend: Mapping[str, Any]) -> bool:
    """Whether it puts a space before a text that has none, and not after special tokens; llama.cpp puts them there."""
    pieces = backend.get("pre_tokenizer") or {}
    return backend.get("normalizer") is None and (
        pieces.get("type") == "Metaspace"
        and pieces.get("replacement") == SPACE
        and pieces.get("prepend_scheme") in ("first", "always")
        and not pieces.get("split", True)
    )


@dataclass(frozen=True, slots=True)
class Splitting:
    """How a byte-level tokenizer prepares text for its merges.

    Attributes:
        pattern: the pieces; None is GPT-2's.
        single_digits: cut every digit off first.
        whole_words: a piece that is a token is taken whole, whatever the merges say.
        begins: the text begins with the BOS token unless the file says otherwise.
        composed: Unicode is brought to its composed form (NFC).
    """

    pattern: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    begins: bool = False
    composed: bool = False

    def apply(self, tokenizer: Any) -> None:
        """Set a ``tokenizers.Tokenizer`` up to split so."""
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None)
        if self.pattern is not None:
            pieces = pre_tokenizers.Split(Regex(self.pattern), behavior="isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
        elif self.single_digits:
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        else:
            tokenizer.pre_tokenizer = byte_level
        tokenizer.model.ignore_merges = self.whole_words
        if self.composed:
            tokenizer.normalizer = normalizers.NFC()

    @classmethod
    def of(cls, backend: Mapping[str, Any]) -> Splitting | None:
        """What a parsed ``tokenizer.json`` does; None where it does what no splitting says."""
        found = _pieces(backend.get("pre_tokenizer"))
        normalizer = backend.get("normalizer")
        if found is None or normalizer not in (None, {"type": "NFC"}):
            return None
        return replace(found, whole_words=bool(backend["model"].get("ignore_merges")), composed=normalizer is not None)

    @property
    def names(self) -> list[str]:
        """What files call it; none where it is not known. Whether the text begins with BOS is said elsewhere."""
        return [name for name, known in SPLITTINGS.items() if replace(known, begins=self.begins) == self]


def _pieces(pre_tokenizer: Any) -> Splitting | None:
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return Splitting()
        case {"type": "Sequence", "pretokenizers": [first, {"type": "ByteLevel", "add_prefix_space": False} as last]}:
            return _first_pieces(first, whole=last.get("use_regex", True))
    return None


def _first_pieces(first: Any, *, whole: bool) -> Splitting | None:
    """What comes before the bytes, which split themselves as in GPT-2 where ``whole``."""
    match first:
        case {"type": "Digits", "individual_digits": True} if whole:
            return Splitting(single_digits=True)
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return None if whole else Splitting(pattern)
    return None


_ENDING = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_ENDING}"
)
_GPT2 = Splitting()
_DIGITS = Splitting(single_digits=True)
_LLAMA3 = Splitting(rf"{_WORDS}|\p{{N}}{{1,3}}{_MARKS}{_ENDING}", whole_words=True, begins=True)
_QWEN2 = Splitting(rf"{_WORDS}|\p{{N}}{_MARKS}{_ENDING}", composed=True)
SPLITTINGS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "minerva-7b": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": Splitting(_TEKKEN, whole_words=True, begins=True),
}
"""By name; of several names for one splitting the first is the one that is written."""
