"""The tensors of a GGUF file: their names, types and row orders there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import gguf
import torch
from transformers import PreTrainedConfig

from quantkit.errors import SourceError
from quantkit.exports.content import Content, Stored
from quantkit.exports.gguf_files import Entry
from quantkit.gguf.blocks import type_of
from quantkit.gguf.config import ROPE_FACTORS
from quantkit.gguf.metadata import ARCHITECTURES, OTHER_FORMAT, rope_divisors
from quantkit.gguf.names import in_gguf_order, namer, rotated_heads
from quantkit.gguf.tensors_in import FLOATS

Q = gguf.GGMLQuantizationType
FLOAT_KINDS = {torch.float32: Q.F16, torch.float16: Q.F16, torch.bfloat16: Q.BF16}
"""By the dtype of a float matrix, its type in the file."""
DERIVED = "rotary_emb.inv_freq"
"""Tensors of old checkpoints that follow from the config."""
HEAD = "lm_head.weight"
BLOCKS = "weight"
"""The suffix of a layer's packed blocks."""


class Naming:
    """Names and row orders of one model.

    Args:
        config: of the model.
        folder: where it lies, for messages.
    """

    def __init__(self, config: PreTrainedConfig, folder: Path) -> None:
        self._architecture = ARCHITECTURES[config.model_type]
        self._stored = namer(self._architecture, config.num_hidden_layers)
        self._heads = (config.num_attention_heads, config.num_key_value_heads)
        self._folder = folder

    def name(self, parameter: str) -> str:
        """What a GGUF file calls a parameter.

        Raises:
            SourceError: it has no place there.
        """
        found = self._stored(parameter)
        if found is None:
            raise SourceError(
                f"{self._folder}: a GGUF file of a {self._architecture} model has no place for {parameter}",
                OTHER_FORMAT,
            )
        return found

    def ordered(self, parameter: str, read: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """A reader that gives the rows in the file's order."""
        heads = rotated_heads(self._architecture, parameter, *self._heads)
        return read if heads is None else lambda: in_gguf_order(read(), heads)


def written_floats(names: Collection[str], config: PreTrainedConfig) -> list[str]:
    """Those of a model's float tensors that go into the file: not those that follow from others."""
    left_out = {HEAD} if config.tie_word_embeddings else set()
    return [name for name in names if name not in left_out and not name.endswith(DERIVED)]


def entries(content: Content, config: PreTrainedConfig) -> list[Entry]:
    """Every tensor of the file, in the order of the model.

    Raises:
        SourceError: a tensor has no place in the file.
    """
    naming = Naming(config, content.origin)
    found = [*_packed(content, naming), *_floats(content, config, naming), *_rope_factors(config)]
    return sorted(found, key=_place)


def _packed(content: Content, naming: Naming) -> Iterator[Entry]:
    for layer, scheme in content.schemes.items():
        stored, kind = content.packed[layer][BLOCKS], Q[type_of(scheme)]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        rows, row_bytes = stored.shape
        name = f"{layer}.weight"
        shape = (rows, row_bytes // block_bytes * block)
        yield Entry(naming.name(name), int(kind), shape, rows * row_bytes, naming.ordered(name, stored.read))


def _floats(content: Content, config: PreTrainedConfig, naming: Naming) -> Iterator[Entry]:
    for name in written_floats(content.floats, config):
        kind = float_kind(content.floats[name])
        stored = content.floats[name].cast(FLOATS[kind], name)
        nbytes = math.prod(stored.shape) * stored.dtype.itemsize
        yield Entry(naming.name(name), int(kind), stored.shape, nbytes, naming.ordered(name, stored.read))


def float_kind(stored: Stored) -> gguf.GGMLQuantizationType:
    """The type in which the file holds a float tensor: vectors in F32, matrices in 16 bits."""
    return FLOAT_KINDS[stored.dtype] if len(stored.shape) > 1 else Q.F32


def _rope_factors(config: PreTrainedConfig) -> Iterator[Entry]:
    divisors = rope_divisors(config)
    if divisors is not None:
        tensor = torch.tensor(divisors, dtype=torch.float32)
        yield Entry(ROPE_FACTORS, int(Q.F32), tuple(tensor.shape), tensor.nbytes, lambda: tensor)


def _place(entry: Entry) -> tuple[int, str]:
    """The embedding, the blocks in their order, then the rest."""
    block = re.match(r"blk\.(\d+)\.", entry.name)
    if block:
        return int(block[1]), entry.name
    return (-1 if entry.name.startswith("token_embd") else 1 << 30), entry.name
