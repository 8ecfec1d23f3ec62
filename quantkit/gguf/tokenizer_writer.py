"""From a tokenizer of transformers to the vocabulary of a GGUF file: the inverse of the reader.

Two kinds can be said: byte-level BPE, whose splitting goes by a name (:mod:`quantkit.gguf.splitting`), and
the BPE of sentencepiece with bytes to fall back on, whose merges follow from a score for each token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from quantkit.checkpoint import tokenizer_files
from quantkit.errors import SourceError
from quantkit.gguf.head import OTHER_FORMAT
from quantkit.gguf.splitting import (
    Splitting,
    puts_no_space,
    puts_space_before_first_text,
    puts_space_before_text,
)
from quantkit.gguf.vocabulary import SPECIAL, TokenType

ANSWER = "quantkit-answer"
"""Stands for an answer where a chat template is asked how it ends one."""
MARK = re.compile(r"<[^<>\s]{1,40}>")
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
COMPOSED = "gguf: llama.cpp does not bring Unicode to its composed form (NFC), as the model's tokenizer does"
SPACED = "gguf: llama.cpp puts a space before every text after a special token, the model's tokenizer before the first"

ENDLESS = (
    "gguf: the chat template ends an answer in plain words, so a model may write on; give Ollama a PARAMETER stop and"
    ' llama-server a "stop" with these words'
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Every row of the embedding.

    Attributes:
        tokens: the texts.
        kinds: the type of each.
    """

    tokens: list[str]
    kinds: list[TokenType]


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder.

    Raises:
        SourceError: it cannot be read, or is none of the package tokenizers.
    """
    try:
        tokenizer = tokenizer_files.read_tokenizer(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder}: the tokenizer cannot be read: {error}", OTHER_FORMAT) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise SourceError(f"{folder}: {type(tokenizer).__name__} has no tokenizer.json", OTHER_FORMAT)
    return tokenizer


def tokenizer_metadata(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: int) -> dict[str, Any]:
    """The keys of a tokenizer.

    Args:
        tokenizer: see :func:`read_tokenizer`.
        folder: of the model, for messages and its generation config.
        rows: of the embedding; those without a token become unused ones.

    Raises:
        SourceError: GGUF has no words for what the tokenizer does.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = _vocabulary(tokenizer, folder, rows)
    model = backend["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("end_of_word_suffix"):
        raise SourceError(f"{folder}: quantkit cannot write a {model['type']} tokenizer of this kind as GGUF",
                          OTHER_FORMAT)  # fmt: skip
    if model.get("byte_fallback"):
        found = _sentencepiece(backend, vocabulary, folder)
    else:
        found = _byte_level(backend, vocabulary, folder)
    return found | _special(tokenizer, folder, rows) | _template(tokenizer)


def remarks_on(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Where llama.cpp gives other tokens than transformers, on one line each."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    remarks = {COMPOSED: backend.get("normalizer") == {"type": "NFC"}}
    remarks[ENDLESS] = _after_an_answer(tokenizer) != "" and turn_end(tokenizer) is None
    remarks[SPACED] = bool(backend["model"].get("byte_fallback")) and puts_space_before_first_text(backend)
    return tuple(remark for remark, holds in remarks.items() if holds)


def _byte_level(backend: dict[str, Any], vocabulary: Vocabulary, folder: Path) -> dict[str, Any]:
    splitting = Splitting.of(backend)
    names = [] if splitting is None else splitting.names
    if not names:
        raise SourceError(
            f"{folder}: the tokenizer splits text in a way that GGUF files have no name for, as far as quantkit knows",
            OTHER_FORMAT,
        )
    alphabet = set(ByteLevel.alphabet())
    for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        if kind == TokenType.NORMAL and not set(token) <= alphabet:
            raise SourceError(f"{folder}: the token {token!r} is not written in bytes", OTHER_FORMAT)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names[0],
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.kinds,
        "tokenizer.ggml.merges": [
            merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]
        ],
    }


def _sentencepiece(backend: dict[str, Any], vocabulary: Vocabulary, folder: Path) -> dict[str, Any]:
    """The keys of a BPE of sentencepiece: a score for each token in place of merges, which must follow from them."""
    spaced = puts_space_before_text(backend) or puts_space_before_first_text(backend)
    if not (spaced or puts_no_space(backend)):
        raise SourceError(f"{folder}: the tokenizer puts spaces where llama.cpp does not", OTHER_FORMAT)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in backend["model"]["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    unknown = backend["model"].get("unk_token")
    kinds = [
        TokenType.UNKNOWN if token == unknown else TokenType.BYTE if BYTE_TOKEN.fullmatch(token) else kind
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    ]
    normal = {token for token, kind in zip(vocabulary.tokens, kinds, strict=True) if kind == TokenType.NORMAL}
    if _splits(normal) != {(left, right) for left, right in merges if {left, right, left + right} <= normal}:
        raise SourceError(f"{folder}: the tokenizer's merges are not those of a sentencepiece model", OTHER_FORMAT)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [float(-ranks.get(token, len(merges))) for token in vocabulary.tokens],
        "tokenizer.ggml.add_space_prefix": spaced,
    }


def _splits(known: Collection[str]) -> set[tuple[str, str]]:
    """Every way to make a token of two."""
    return {
        (token[:place], token[place:])
        for token in known
        for place in range(1, len(token))
        if token[:place] in known and token[place:] in known
    }


def _vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: int) -> Vocabulary:
    """Every row of the embedding with its token.

    Tokens beyond the last row are left out where they were added, as transformers does for some families.
    """
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {number: token.special for number, token in tokenizer.added_tokens_decoder.items()}
    unplaced = [number for number in tokens if number >= rows and number not in added]
    if unplaced:
        raise SourceError(
            f"{folder}: the tokenizer has the token {max(unplaced)}, and the embedding has {rows} rows",
            "give the model its own tokenizer",
        )
    kinds = [
        TokenType.UNUSED if number not in tokens
        else TokenType.NORMAL if number not in added
        else TokenType.CONTROL if added[number]
        else TokenType.USER_DEFINED
        for number in range(rows)
    ]  # fmt: skip
    return Vocabulary([tokens.get(number, f"[PAD{number}]") for number in range(rows)], kinds)


def _special(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: int) -> dict[str, Any]:
    """The special tokens that have a row, and which of them a text is given."""
    stated = {name: getattr(tokenizer, f"{attribute}_id") for attribute, name in SPECIAL.items()}
    ids = {name: number if number is not None and number < rows else None for name, number in stated.items()}
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    begins, ends = framed[:1] == [ids["bos"]], framed[-1:] == [ids["eos"]]
    if framed != [*([ids["bos"]] if begins else []), *plain, *([ids["eos"]] if ends else [])]:
        raise SourceError(f"{folder}: the tokenizer adds other tokens than BOS and EOS to a text", OTHER_FORMAT)
    found = {f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number is not None}
    turn = _end_of_turn(tokenizer, folder)
    if turn is not None:
        found["tokenizer.ggml.eot_token_id"] = turn
    return found | {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}


def end_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[int]:
    """Every token that ends a turn or a text: the tokenizer's, those of ``generation_config.json``, the template's."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        stated = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except FileNotFoundError:
        stated = None
    except (OSError, ValueError, AttributeError) as error:
        raise SourceError(
            f"{folder / 'generation_config.json'} cannot be read: {error}", "get the file again"
        ) from error
    found += stated if isinstance(stated, list) else [] if stated is None else [stated]
    mark = turn_end(tokenizer)
    found += [number for token, number in _added(tokenizer) if token == mark]
    return list(dict.fromkeys(number for number in found if isinstance(number, int)))


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The mark with which the chat template ends an answer, a token or not; None where it has no such mark.

    Models that were trained on another template than their base often have the base's end of text as their EOS alone.
    """
    following = _after_an_answer(tokenizer)
    names = sorted((token for token, _ in _added(tokenizer)), key=len, reverse=True)
    marked = MARK.match(following)
    return next((name for name in names if following.startswith(name)), marked and marked[0])


def _added(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int]]:
    """The added tokens that are more than space, with their numbers."""
    return [(str(token), number) for number, token in tokenizer.added_tokens_decoder.items() if str(token).strip()]


def _after_an_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes after an answer, without spaces; empty where it has none or refuses one."""
    template = chat_template(tokenizer)
    if not template:
        return ""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
        return ""  # a template may refuse any record, and no stop follows from it then
    return text.rpartition(ANSWER)[2].lstrip()


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, folder: Path) -> int | None:
    """The token that ends a turn where it is not the one that ends a text."""
    template = chat_template(tokenizer) or ""
    used = [number for number in end_ids(tokenizer, folder) if str(tokenizer.convert_ids_to_tokens(number)) in template]
    return used[0] if used and tokenizer.eos_token_id not in used else None


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template; of several the one called ``default``."""
    given = tokenizer.chat_template
    return given.get("default") if isinstance(given, dict) else given


def _template(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    template = chat_template(tokenizer)
    return {} if not template else {"tokenizer.chat_template": template}
