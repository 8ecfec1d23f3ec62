"""From a GGUF file's vocabulary to the tokenizer files that transformers reads.

The merges of a sentencepiece vocabulary follow from its scores. How a byte-level tokenizer splits text before the
merges, which a GGUF file gives by a name alone, is set from what the models of that name use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from quantkit.errors import SourceError, did_you_mean
from quantkit.gguf.head import GIVE_FLOAT, GGUFHead
from quantkit.gguf.splitting import SPACE, SPLITTINGS, Splitting, mark_spaces
from quantkit.gguf.vocabulary import SPECIAL, TokenType, check_vocabulary
from quantkit.system.artifacts import read_json, translated_os_errors, write_json

NOISE = ("backend", "is_local", "local_files_only", "name_or_path", "vocab_file")


def write_tokenizer(head: GGUFHead, folder: Path) -> None:
    """Write ``tokenizer.json``, its config and the chat template of a GGUF file to ``folder``.

    Raises:
        SourceError: the file's tokenizer is broken, or of a kind that quantkit cannot convert.
    """
    splitting = _splitting(head)
    check_vocabulary(head)
    try:
        tokenizer = _sentencepiece(head) if splitting is None else _byte_level(head, splitting)
    except Exception as error:  # the package tokenizers raises no narrower class, and transformers any
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise SourceError(f"{head.path}: its tokenizer cannot be built: {what}", GIVE_FLOAT) from error
    with translated_os_errors(folder):
        tokenizer.save_pretrained(folder)
    config = read_json(folder / "tokenizer_config.json")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", {key: config[key] for key in config if key not in NOISE})


def _byte_level(head: GGUFHead, splitting: Splitting) -> PreTrainedTokenizerFast:
    """The tokenizer of a byte-level vocabulary."""
    metadata, tokens = head.metadata, head.metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    backend.decoder = decoders.ByteLevel()
    splitting.apply(backend)
    return _wrapped(head, backend, begins=splitting.begins)


def _wrapped(head: GGUFHead, backend: Tokenizer, *, begins: bool) -> PreTrainedTokenizerFast:
    """With the tokens that are found before a text is split, and the special ones by their names."""
    metadata, tokens = head.metadata, head.metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    found = [
        AddedToken(token, normalized=False, special=kind == TokenType.CONTROL)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    backend.add_tokens(found)
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", begins),
        add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False),
        **{name: None if number is None else tokens[number] for name, number in ids.items()},
    )


def _sentencepiece(head: GGUFHead) -> PreTrainedTokenizerFast:
    """The tokenizer of a sentencepiece vocabulary, which may put a space before every text between special tokens."""
    metadata = head.metadata
    vocabulary = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = _merges(vocabulary, metadata["tokenizer.ggml.scores"])
    number = metadata.get("tokenizer.ggml.unknown_token_id")
    unknown = None if number is None else metadata["tokenizer.ggml.tokens"][number]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    before = metadata.get("tokenizer.ggml.add_space_prefix", True)
    mark_spaces(backend, before_text=before)
    stripped = [decoders.Strip(" ", 1, 0)] if before else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    backend.decoder = decoders.Sequence(steps)
    return _wrapped(head, backend, begins=True)


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two, those of the highest score first."""
    found = [
        (-scores[number], vocabulary[token[:place]], vocabulary[token[place:]], token[:place], token[place:])
        for token, number in vocabulary.items()
        for place in range(1, len(token))
        if token[:place] in vocabulary and token[place:] in vocabulary
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _splitting(head: GGUFHead) -> Splitting | None:
    """How to split for a byte-level vocabulary; None for a sentencepiece one, which does not."""
    kind = head.metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        return None
    if kind != "gpt2":
        raise SourceError(f"{head.path}: quantkit cannot convert the tokenizer model {kind!r}", GIVE_FLOAT)
    name = str(head.metadata.get("tokenizer.ggml.pre", "default"))
    if name not in SPLITTINGS:
        raise SourceError(
            f"{head.path}: quantkit does not know how the tokenizer '{name}' splits text",
            f"{did_you_mean(name, SPLITTINGS)}; or {GIVE_FLOAT}",
        )
    return SPLITTINGS[name]
