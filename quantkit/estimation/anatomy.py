"""What a model is made of, told without its weights: the shapes of its tensors, and what tokens leave in its cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "embedding", "tower", "other"]


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter.

    Attributes:
        name: its full name in a checkpoint, such as ``model.layers.0.mlp.up_proj.weight``.
        shape: of the tensor; of a linear layer ``(out_features, in_features)``.
        kind: ``linear`` is a matrix that can be quantized, ``embedding`` the input embedding; ``tower`` is what text
            does not pass, such as a tower of images.
        block: index of the decoder block that holds it; None outside the blocks.
        share: of the tokens of text that it computes with: of an expert those that are routed to it, on average.
        keeps_float: why a linear layer stays float unless a recipe asks for it; None where it does not.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    block: int | None = None
    share: float = 1.0
    keeps_float: str | None = None

    @property
    def layer(self) -> str:
        """Full name of the module that it belongs to."""
        return self.name.removesuffix(".weight")

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """``(rows, columns)`` of one that has two dimensions."""
        rows, columns = self.shape
        return rows, columns


@dataclass(frozen=True, slots=True)
class Cache:
    """What a block keeps of a sequence.

    Attributes:
        values: numbers of each token that it has seen.
        words: how many that are, such as ``2 x 8 heads x 128``.
        window: tokens that it looks back at most; None for all.
        state: numbers of the whole sequence, as recurrent blocks keep.
        heads: of keys and of values together; 0 for what has none.
    """

    values: int
    words: str
    window: int | None = None
    state: int = 0
    heads: int = 0

    def tokens(self, context: int) -> int:
        """Tokens of a sequence of ``context`` that it keeps."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True, slots=True)
class Input:
    """What layers of a block read.

    Attributes:
        layers: full names of those that read it.
        paused: numbers of a token that are alive when the first of them is called, the input among them.
    """

    layers: tuple[str, ...]
    paused: int


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A language model.

    Attributes:
        name: as it was asked for.
        family: transformers' ``model_type``.
        dtype: of its weights: ``float32``, ``float16`` or ``bfloat16``.
        hidden: width of the residual stream.
        wide: width of what a token's MLP computes with at once; of experts, of all that a token goes to.
        queries: width of all query heads together.
        keys: width of all key heads together.
        vocabulary: number of tokens.
        blocks: number of decoder blocks.
        weights: every parameter once, experts one by one; of a head tied to the embedding there is only the latter.
        caches: of each block that keeps something.
        embedding: full name of the input embedding.
        head: full name of the output head, tied or not.
        tied: the head is the embedding.
        largest: index of the block that has the most parameters; of several the second, which unlike the first does not
            read the embedding itself.
        inputs: what its layers read, in the order of their calls.
        context: tokens that the model was made for; None where its config does not say.
        rope_factors: numbers that a GGUF file has for a rope of Llama 3.1; else 0.
        notes: what is left out of the description.
    """

    name: str
    family: str
    dtype: str
    hidden: int
    wide: int
    queries: int
    keys: int
    vocabulary: int
    blocks: int
    weights: tuple[Weight, ...]
    caches: tuple[Cache, ...]
    embedding: str
    head: str
    tied: bool
    largest: int
    inputs: tuple[Input, ...]
    context: int | None = None
    rope_factors: int = 0
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters, those of a tied head once."""
        return sum(weight.numel for weight in self.weights)

    @property
    def active(self) -> int:
        """Number of parameters that a token of text computes with; the embedding counts as a whole."""
        return round(sum(weight.numel * weight.share for weight in self.weights if weight.kind != "tower"))

    @property
    def towers(self) -> int:
        """Number of parameters that text does not pass."""
        return sum(weight.numel for weight in self.weights if weight.kind == "tower")

    @property
    def head_shape(self) -> tuple[int, int]:
        """Of the output head."""
        return self.vocabulary, self.hidden

    def linears(self) -> dict[str, tuple[tuple[int, int], int | None]]:
        """Every linear layer, the head too, with its shape and block."""
        found = {weight.layer: (weight.matrix, weight.block) for weight in self.weights if weight.kind == "linear"}
        return found if self.head in found else found | {self.head: (self.head_shape, None)}

    def keeps_float(self) -> dict[str, str]:
        """The linear layers that stay float unless a recipe asks for them, each with the reason."""
        return {weight.layer: weight.keeps_float for weight in self.weights if weight.keeps_float is not None}

    def in_blocks(self) -> int:
        """Number of weights in the matrices of the decoder blocks."""
        return sum(weight.numel for weight in self.weights if weight.block is not None and len(weight.shape) > 1)

    def in_largest(self) -> int:
        """Number of parameters of the largest block."""
        return sum(weight.numel for weight in self.weights if weight.block == self.largest)
