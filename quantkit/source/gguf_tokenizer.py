"""From a GGUF file's vocabulary to the tokenizer files that transformers reads.

The vocabulary, merges and special tokens are read by transformers. How text is split before the merges, which
a GGUF file gives by a name alone, is set here from what the models of that name use.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantkit.artifacts import read_json, translated_os_errors, write_json
from quantkit.errors import SourceError, did_you_mean
from quantkit.source.gguf_head import GIVE_FLOAT, GGUFHead

NOISE = ("backend", "is_local", "local_files_only", "name_or_path", "vocab_file")


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
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": Splitting(_TEKKEN, whole_words=True, begins=True),
}


def write_tokenizer(head: GGUFHead, folder: Path) -> None:
    """Write ``tokenizer.json``, its config and the chat template of a GGUF file to ``folder``.

    Raises:
        SourceError: the file's tokenizer is broken, or of a kind that quantkit cannot convert.
    """
    splitting = _splitting(head)
    _check_vocabulary(head)
    options: dict[str, Any] = {}
    if splitting and splitting.begins and "tokenizer.ggml.add_bos_token" not in head.metadata:
        options["add_bos_token"] = True
    # Alone in a folder: other tokenizer files beside the GGUF file would be read in its place.
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / "model.gguf").symlink_to(head.path.resolve())
        tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file="model.gguf", **options)
    if splitting:
        _apply(splitting, tokenizer.backend_tokenizer)
    with translated_os_errors(folder):
        tokenizer.save_pretrained(folder)
    config = read_json(folder / "tokenizer_config.json")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", {key: config[key] for key in config if key not in NOISE})


def _apply(splitting: Splitting, tokenizer: Any) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None)
    if splitting.pattern is not None:
        pieces = pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    elif splitting.single_digits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.model.ignore_merges = splitting.whole_words
    if splitting.composed:
        tokenizer.normalizer = normalizers.NFC()


def _splitting(head: GGUFHead) -> Splitting | None:
    """How to split for a byte-level vocabulary; None for a sentencepiece one, which does not."""
    kind = head.metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        if head.metadata.get("tokenizer.ggml.add_space_prefix") is False:
            raise SourceError(f"{head.path}: a sentencepiece tokenizer without space prefix", GIVE_FLOAT)
        return None
    if kind != "gpt2":
        raise SourceError(f"{head.path}: quantkit cannot convert the tokenizer model {kind!r}", GIVE_FLOAT)
    name = str(head.metadata.get("tokenizer.ggml.pre"))
    if name not in SPLITTINGS:
        raise SourceError(
            f"{head.path}: quantkit does not know how the tokenizer '{name}' splits text",
            f"{did_you_mean(name, SPLITTINGS)}; or {GIVE_FLOAT}",
        )
    return SPLITTINGS[name]


def _check_vocabulary(head: GGUFHead) -> None:
    """Check what the tokenizer is built from, whose builders do not say what is wrong with it."""
    tokens = _strings(head, "tokenizer.ggml.tokens")
    known = set(tokens)
    for name in ("bos", "eos", "unknown", "padding"):
        number = head.metadata.get(f"tokenizer.ggml.{name}_token_id", 0)
        if type(number) is not int or not 0 <= number < len(tokens):
            raise SourceError(f"{head.path}: the {name} token {number!r} is not in the vocabulary", GIVE_FLOAT)
    template = head.metadata.get("tokenizer.chat_template", "")
    if not isinstance(template, str):
        raise SourceError(f"{head.path}: the chat template is not text", GIVE_FLOAT)
    if head.metadata["tokenizer.ggml.model"] != "gpt2":
        if len(head.metadata.get("tokenizer.ggml.scores") or ()) != len(tokens):
            raise SourceError(f"{head.path}: the vocabulary does not have a score for each token", GIVE_FLOAT)
        return
    for merge in _strings(head, "tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not (space and left in known and right in known and left + right in known):
            raise SourceError(f"{head.path}: the merge {merge!r} joins what is not in the vocabulary", GIVE_FLOAT)


def _strings(head: GGUFHead, key: str) -> list[str]:
    value = head.metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise SourceError(f"{head.path}: the metadata key '{key}' is not a list of texts", GIVE_FLOAT)
    return value
