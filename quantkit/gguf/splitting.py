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
MARKED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
SPACED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, MARKED]}
"""The normalizer that :func:`mark_spaces` sets with a space before the text, as ``tokenizer.json`` says it."""


def mark_spaces(tokenizer: Any, *, before_text: bool) -> None:
    """Set a sentencepiece ``tokenizers.Tokenizer`` up to write spaces, and to put one before every text, or not."""
    marked = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), marked]) if before_text else marked


def puts_no_space(backend: Mapping[str, Any]) -> bool:
    """Whether a parsed ``tokenizer.json`` writes spaces and puts none before a text, as Gemma's does."""
    cuts = backend.get("pre_tokenizer")
    harmless = cuts is None or (cuts["type"] == "Split" and cuts["pattern"] == {"String": " "})
    return _alone(backend.get("normalizer")) == MARKED and harmless


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


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pieces of GPT-2, which a byte-level pre-tokenizer splits itself."""
PUNCTUATION, DIGIT, DIGITS = r"[\p{P}\$\+<=>\^~\|`]+", r"\p{N}", r"\p{N}+"


@dataclass(frozen=True, slots=True)
class Splitting:
    """How a byte-level tokenizer prepares text for its merges.

    Attributes:
        patterns: each cuts what those before it left: what it finds, and what lies between.
        whole_words: a piece that is a token is taken whole, whatever the merges say.
        begins: the text begins with the BOS token unless the file says otherwise.
        composed: Unicode is brought to its composed form (NFC).
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False
    composed: bool = False

    def apply(self, tokenizer: Any) -> None:
        """Set a ``tokenizers.Tokenizer`` up to split so."""
        itself = self.patterns[-1] == GPT2
        cuts = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated")
            for pattern in (self.patterns[:-1] if itself else self.patterns)
        ]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=itself)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level]) if cuts else byte_level
        tokenizer.model.ignore_merges = self.whole_words
        if self.composed:
            tokenizer.normalizer = normalizers.NFC()

    @classmethod
    def of(cls, backend: Mapping[str, Any]) -> Splitting | None:
        """What a parsed ``tokenizer.json`` does; None where it does what no splitting says."""
        before = backend.get("pre_tokenizer")
        steps = before["pretokenizers"] if before and before["type"] == "Sequence" else [before]
        patterns = [_pattern(step) for step in steps]
        normalizer = _alone(backend.get("normalizer"))
        bytes_last = any(step and step["type"] == "ByteLevel" for step in steps)
        if None in patterns or not bytes_last or normalizer not in (None, {"type": "NFC"}):
            return None
        found = tuple(pattern for pattern in patterns if pattern)
        words = bool(backend["model"].get("ignore_merges"))
        return cls(found, words, composed=normalizer is not None)

    @property
    def names(self) -> list[str]:
        """What files call it, the best first; none where it is not known.

        Whether the text begins with BOS is said elsewhere, and composing is what llama.cpp does under no name.
        """
        alike = [
            (known.composed != self.composed, number, name)
            for number, (name, known) in enumerate(SPLITTINGS.items())
            if replace(known, begins=False, composed=False) == replace(self, begins=False, composed=False)
        ]
        return [name for _, _, name in sorted(alike)]


def _pattern(step: Any) -> str | None:
    """The pattern of a step of a pre-tokenizer; empty where it cuts nothing, None where no pattern says it."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return GPT2 if step.get("use_regex", True) else ""
        case {"type": "Digits", "individual_digits": bool(single)}:
            return DIGIT if single else DIGITS
        case {"type": "Punctuation", "behavior": "Contiguous"}:
            return PUNCTUATION
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return _escaped(pattern)
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed", "invert": True}:
            return _escaped(pattern)  # of patterns that leave nothing out
    return None


def _escaped(pattern: str) -> str:
    """A pattern with its ends of lines written out, which some tokenizers hold as they are."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def _alone(step: Any) -> Any:
    """A step of a sequence that has no other, and None for none."""
    if step and step["type"] == "Sequence" and len(step["normalizers"]) < 2:
        return step["normalizers"][0] if step["normalizers"] else None
    return step


_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDING = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_WORDS = rf"{_SUFFIXES}|{_LETTERS}"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LOWER_LAST = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_UPPER_FIRST = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_PATHS = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_ENDING}"
_TEKKEN = rf"{_LOWER_LAST}|{_UPPER_FIRST}|\p{{N}}{_PATHS}"
_GPT4O = rf"{_LOWER_LAST}{_SUFFIXES}?|{_UPPER_FIRST}{_SUFFIXES}?|\p{{N}}{{1,3}}{_PATHS}"
_QWEN35 = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_ENDING}"
_ASIAN = "[一-龥぀-ゟ゠-ヿ]+"  # noqa: RUF001 - the letters that the pattern is of
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*{_ENDING}"
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # noqa: RUF001 - marks of other scripts, as they are
_THREES = rf"{_WORDS}|\p{{N}}{{1,3}}{_MARKS}{_ENDING}"
_ONES = rf"{_WORDS}|\p{{N}}{_MARKS}{_ENDING}"
_PLAIN, _COMPOSED = Splitting((GPT2,)), Splitting((GPT2,), composed=True)
_SINGLE, _COMPOSED_SINGLE = Splitting((DIGIT, GPT2)), Splitting((DIGIT, GPT2), composed=True)
_LLAMA3 = Splitting((_THREES,), whole_words=True, begins=True)
_SMAUG = Splitting((_THREES,))
_QWEN2 = Splitting((_ONES,), composed=True)
_TAKEN_IN_THREES = Splitting((r"\p{N}{1,3}", _ASIAN, _DEEPSEEK3))
SPLITTINGS = {
    **dict.fromkeys(("gpt-2", "phi-2", "jais", "trillion", "granite-docling", "exaone4", "gigachat"), _PLAIN),
    **dict.fromkeys(("mpt", "olmo", "modern-bert"), _COMPOSED),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"), _SINGLE),
    "command-r": _COMPOSED_SINGLE,
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "midm-2.0", "lfm2"), _LLAMA3),
    "glm4": Splitting((_THREES,), whole_words=True),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe"), _SMAUG),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"), _QWEN2),
    "qwen35": Splitting((_QWEN35,), composed=True),
    "tekken": Splitting((_TEKKEN,), whole_words=True, begins=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), Splitting((_GPT4O,))),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _TAKEN_IN_THREES),
    "deepseek-coder": Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGIT)),
    "falcon": Splitting((PUNCTUATION, GPT2, DIGITS, "[0-9][0-9][0-9]")),
    "default": Splitting((r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, "[0-9][0-9][0-9]")),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), Splitting((_BLOOM,))),
    "viking": Splitting((_BLOOM, DIGIT)),
    "seed-coder": Splitting((rf"{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_ENDING}",)),
    "bailingmoe": Splitting((rf"'(?i:[sdmt]|ll|ve|re)|{_LETTERS}|\p{{N}}{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+",)),
}
"""By name, those of ``llama-vocab.cpp``; of several names for one splitting the first is the one that is written."""
