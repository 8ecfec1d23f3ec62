"""Tiny models and tokenizers that are written as GGUF, and llama.cpp's own view of the files."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quantkit.checkpoint import CheckpointReader
from quantkit.exports.content import Content, Stored, digest
from quantkit.formats.gguf import Gguf
from quantkit.gguf.kquants import decoded
from quantkit.gguf.splitting import SPLITTINGS
from quantkit.llama_cpp.quantizer import quantize_rows
from quantkit.numerics.grid_search import encode, quantized, search_grid
from quantkit.schemes import GgmlScheme, QuantizedWeight, Scheme
from tests.tiny import SPECIAL, make_model

PROSE = (
    "The children of the house were singing when the rain came over the hills. In 1984 there were 365 of them; "
    "they'd walked 12 miles, and we've heard they'll walk 1,234 more!\n\n    def run(x):\n\treturn x + 1\n"
)
TEXTS = (
    "In  1234 the cat's   hat\n\n  costs 3.50 €",
    "<|im_start|>user\nHello  there!<|im_end|>\n<|im_start|>assistant\n",
    " leading and trailing ",
    "naïve Größe 漢字 🙂 \u00a0 x\t\ty",
    "They'LL don't  we're\r\n\r\n----->>> ((a)) ",
    "a<think>b</think> c <end▁of▁thought>",
)
"""Digits, spaces, newlines, Unicode, special tokens and one that is added without being special."""
ADDED = ["<think>", "</think>", "<end▁of▁thought>"]


def byte_level_tokenizer(splitting: str = "gpt-2", size: int = 420) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few lines, which splits as models of that name do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([PROSE] * 3, trainer)
    SPLITTINGS[splitting].apply(tokenizer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return _wrapped(tokenizer, "<pad>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE as sentencepiece makes it: scores that all its merges follow from, bytes to fall back on, a BOS."""
    pieces = ["▁", *sorted(set(PROSE) - set(" \n\t")), "th", "he", "▁th", "▁the", "in", "ing", "er", "▁w", "re", "an"]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *pieces,
        "<|im_start|>",
        "<|im_end|>",
    ]
    merges = [
        (piece[:place], piece[place:])
        for piece in pieces
        for place in range(1, len(piece))
        if piece[:place] in pieces and piece[place:] in pieces
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(tokenizer, "</s>", unk_token="<unk>")


def _wrapped(tokenizer: Tokenizer, padding: str, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token=padding,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template="{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
        **names,
    )


def model_with(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: int | None = None) -> Path:
    """A tiny llama with a tokenizer, and as many rows in its embedding as there are tokens, or more."""
    make_model(folder, vocab_size=rows or len(tokenizer))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def content_of(folder: Path, scheme: Scheme | None, embedding: Scheme | None = None, **changes: Any) -> Content:
    """A model with every Linear layer of the blocks in one scheme, rounded to nearest."""
    reader, store = CheckpointReader(folder), Gguf()
    packed: dict[str, Mapping[str, Stored]] = {}
    digests, floats = {}, {}
    linears: dict[str, Scheme | None] = {}
    for name in reader.names():
        layer = name.removesuffix(".weight")
        wanted = embedding if "embed_tokens" in name else scheme if "_proj.weight" in name else None
        if wanted is None:
            floats[name] = Stored.of(reader, name)
            continue
        fitted = store.fitted(solved(reader.read(name).float(), wanted))
        packed[layer] = {suffix: stored(tensor) for suffix, tensor in store.pack(fitted).items()}
        digests[layer] = digest([packed[layer]["weight"].read()])
        linears |= {} if "embed_tokens" in name else {layer: wanted}
    whole = ("model.embed_tokens", embedding) if embedding else None
    dtype = str(reader.dtype(next(iter(floats)))).removeprefix("torch.")
    return Content(folder, dtype, linears, packed, floats, digests, whole, changes)


def solved(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """A weight rounded to nearest, by llama.cpp where only that can."""
    if isinstance(scheme, GgmlScheme):
        return decoded(quantize_rows(weight, None, scheme.ggml_type), scheme)
    grid = search_grid(weight, None, scheme, torch.float16, 8, negative_scales=True)
    return quantized(encode(weight, grid, scheme), grid, scheme)


def stored(tensor: torch.Tensor) -> Stored:
    return Stored(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def llama_cpp_tokens(path: Path, text: str) -> list[int]:
    """The tokens of a text, special ones recognised, by llama.cpp."""
    from quantkit.llama_cpp.library import library

    llama = library()
    model = llama.call("llama_model_load_from_file", str(path).encode(), llama.call("llama_model_default_params"))
    assert model
    tokenize = ctypes.CDLL(str(llama.found.path)).llama_tokenize
    tokenize.restype = ctypes.c_int32
    pointer, number, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    tokenize.argtypes = (pointer, ctypes.c_char_p, number, ctypes.POINTER(number), number, flag, flag)
    data, room = text.encode(), (number * 4096)()
    count = tokenize(llama.call("llama_model_get_vocab", model), data, len(data), room, 4096, True, True)
    llama.call("llama_model_free", model)
    return list(room[:count])
