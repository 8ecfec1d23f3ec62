"""Mixtures of GGML types as llama.cpp's presets make them: more bits for the layers that lose most.

The rules are those of ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in llama.cpp's
``src/llama-quant.cpp`` (commit 007dbbf). They go by a layer's part in its block and by the depth of the block. Not
taken over are the exceptions for Falcon and for models of eight experts. A model of 80 blocks counts as llama.cpp's
"70B" where its heads share keys and values. Whether four query heads or more share them, on which ``Q2_K`` depends, is
taken from the value layer, which then has at most a quarter as many rows as columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from quantkit.errors import SchemeError
from quantkit.schemes.base import Scheme
from quantkit.schemes.ggml import KQUANT_SOURCE, GgmlScheme, Q2KScheme, Q3KScheme, Q4KScheme, Q5KScheme, Q6KScheme
from quantkit.schemes.integer import IntScheme
from quantkit.schemes.kinds import SCHEMES

FALLBACK_BLOCK = 32
FALLBACKS: dict[str, IntScheme] = {
    "q2_k": IntScheme(4, FALLBACK_BLOCK),
    "q3_k": IntScheme(4, FALLBACK_BLOCK),
    "q4_k": IntScheme(5, FALLBACK_BLOCK),
    "q5_k": IntScheme(5, FALLBACK_BLOCK, symmetric=False, zeros="float"),
    "q6_k": IntScheme(8, FALLBACK_BLOCK),
}
"""What takes the place of a type where 256 does not divide a row: Q4_0, Q4_0, Q5_0, Q5_1 and Q8_0 of GGML."""
VALUE, OUTPUT, DOWN, HEAD = "value", "attention output", "down", "head"
PARTS = {
    **dict.fromkeys(("v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "kv_b_proj"), VALUE),
    **dict.fromkeys(("o_proj", "out_proj", "dense"), OUTPUT),
    **dict.fromkeys(("down_proj", "dense_4h_to_h", "fc2", "w2"), DOWN),
    **dict.fromkeys(("lm_head", "embed_out"), HEAD),
}
"""The part that a layer plays, by the last word of its name in transformers; for all others there is no rule."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer stands in its model.

    Attributes:
        part: ``value``, ``attention output``, ``down``, ``head``, or nothing of these.
        block, blocks: index of its decoder block, and how many there are.
        shape: ``(out_features, in_features)``.
    """

    part: str
    block: int
    blocks: int
    shape: tuple[int, int]

    @property
    def more_bits(self) -> bool:
        """The first and the last eighth of the blocks, and every third between."""
        first = self.blocks // 8
        return self.block < first or self.block >= 7 * self.blocks // 8 or (self.block - first) % 3 == 2

    @property
    def shares_values(self) -> bool:
        """Whether four query heads or more share a value head."""
        rows, columns = self.shape
        return columns >= 4 * rows


class GgmlMixture(Scheme):
    """A preset of llama.cpp: one type for most layers and another for some.

    Attributes:
        preset: its name in llama.cpp.
        base: the type of most layers.
    """

    authors_method: ClassVar[str | None] = "llama.cpp"
    usual: ClassVar[Mapping[str, Any]] = {"ignore": [], "embeddings": {}}
    preset: ClassVar[str]
    base: ClassVar[GgmlScheme]

    @property
    def bits(self) -> int:
        """Of most layers."""
        return self.base.bits

    @property
    def group_size(self) -> int:
        """Of most layers."""
        return self.base.group_size

    @property
    def symmetric(self) -> bool:
        """Of most layers."""
        return self.base.symmetric

    @property
    def free_scales(self) -> bool:
        """Of most layers."""
        return False

    def for_layer(self, name: str, block: int | None, blocks: int, shape: tuple[int, int]) -> Scheme:
        """The type that llama.cpp gives the layer; see :meth:`Scheme.for_layer`.

        Raises:
            SchemeError: not even blocks of 32 divide the rows.
        """
        leaf = name.rpartition(".")[2]
        part = PARTS.get(leaf, "")
        if leaf == "c_proj":
            part = DOWN if "mlp" in name else OUTPUT
        if block is None:
            found = Q6KScheme() if part == HEAD else self.base
        else:
            found = self._in_block(Place(part, block, blocks, shape))
        return _fitting(found, shape[1])

    def check_layer(self, out_features: int, in_features: int) -> None:
        """Refuse a layer that no type fits.

        Raises:
            SchemeError: not even blocks of 32 divide its rows.
        """
        _fitting(self.base, in_features)

    def bits_per_weight(self, in_features: int, scale_bits: int = 16, out_features: int | None = None) -> float:
        """Of the type of most layers; what a model comes to is the sum over its layers."""
        return self.base.bits_per_weight(in_features, scale_bits, out_features)

    def describe(self) -> str:
        """Its kind, such as ``q4_k_m``."""
        return self.kind

    def _in_block(self, place: Place) -> GgmlScheme:
        found = self._chosen(place)
        widely_shared = place.blocks == 80 and place.shape[0] < place.shape[1]
        if place.part == VALUE and widely_shared and isinstance(found, Q3KScheme | Q4KScheme):
            return Q5KScheme()
        return found

    @abstractmethod
    def _chosen(self, place: Place) -> GgmlScheme:
        """The preset's own rule for a layer of a decoder block."""


def _fitting(scheme: GgmlScheme, in_features: int) -> Scheme:
    """The scheme, or the one that takes its place where its blocks do not divide the rows."""
    if in_features % scheme.block == 0:
        return scheme
    if in_features % FALLBACK_BLOCK:
        raise SchemeError(
            f"{scheme.kind} and what takes its place have blocks of 256 and {FALLBACK_BLOCK} weights, which do not "
            f"divide the {in_features} input columns",
            "keep this layer float with 'ignore'",
        )
    return FALLBACKS[scheme.kind]


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q2KMixture(GgmlMixture):
    """Q2_K, with Q3_K where values are read, written back and in ``down``; shared values in Q4_K."""

    kind: ClassVar[str] = "q2_k_mix"
    summary: ClassVar[str] = "llama.cpp's preset Q2_K: q2_k, with q3_k or q4_k for v, o and down"
    source: ClassVar[str] = KQUANT_SOURCE
    preset: ClassVar[str] = "Q2_K"
    base: ClassVar[GgmlScheme] = Q2KScheme()

    def _chosen(self, place: Place) -> GgmlScheme:
        if place.part == VALUE:
            return Q4KScheme() if place.shares_values else Q3KScheme()
        return Q3KScheme() if place.part in (OUTPUT, DOWN) else self.base


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q3KMMixture(GgmlMixture):
    """Q3_K, with Q4_K or Q5_K for values, the attention's output and ``down``."""

    kind: ClassVar[str] = "q3_k_m"
    summary: ClassVar[str] = "llama.cpp's preset Q3_K_M: q3_k, with q4_k or q5_k for v, o and down"
    source: ClassVar[str] = KQUANT_SOURCE
    preset: ClassVar[str] = "Q3_K_M"
    base: ClassVar[GgmlScheme] = Q3KScheme()

    def _chosen(self, place: Place) -> GgmlScheme:
        strong = {VALUE: 2, DOWN: place.blocks // 16, OUTPUT: 0}
        if place.part not in strong:
            return self.base
        return Q5KScheme() if place.block < strong[place.part] else Q4KScheme()


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q3KLMixture(GgmlMixture):
    """Q3_K, with Q5_K for values, the attention's output and ``down``."""

    kind: ClassVar[str] = "q3_k_l"
    summary: ClassVar[str] = "llama.cpp's preset Q3_K_L: q3_k, with q5_k for v, o and down"
    source: ClassVar[str] = KQUANT_SOURCE
    preset: ClassVar[str] = "Q3_K_L"
    base: ClassVar[GgmlScheme] = Q3KScheme()

    def _chosen(self, place: Place) -> GgmlScheme:
        return Q5KScheme() if place.part in (VALUE, OUTPUT, DOWN) else self.base


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q4KSMixture(GgmlMixture):
    """Q4_K, with Q5_K for values and ``down`` of the first blocks."""

    kind: ClassVar[str] = "q4_k_s"
    summary: ClassVar[str] = "llama.cpp's preset Q4_K_S: q4_k, with q5_k for v and down of the first blocks"
    source: ClassVar[str] = KQUANT_SOURCE
    preset: ClassVar[str] = "Q4_K_S"
    base: ClassVar[GgmlScheme] = Q4KScheme()

    def _chosen(self, place: Place) -> GgmlScheme:
        strong = {VALUE: 4, DOWN: place.blocks // 8}
        return Q5KScheme() if place.block < strong.get(place.part, 0) else self.base


class _MediumMixture(GgmlMixture):
    def _chosen(self, place: Place) -> GgmlScheme:
        return Q6KScheme() if place.part in (VALUE, DOWN) and place.more_bits else self.base


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q4KMMixture(_MediumMixture):
    """Q4_K, with Q6_K for values and ``down`` of about half of the blocks."""

    kind: ClassVar[str] = "q4_k_m"
    summary: ClassVar[str] = "llama.cpp's preset Q4_K_M: q4_k, with q6_k for v and down of half of the blocks"
    source: ClassVar[str] = KQUANT_SOURCE
    preset: ClassVar[str] = "Q4_K_M"
    base: ClassVar[GgmlScheme] = Q4KScheme()


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q5KMMixture(_MediumMixture):
    """Q5_K, with Q6_K for values and ``down`` of about half of the blocks."""

    kind: ClassVar[str] = "q5_k_m"
    summary: ClassVar[str] = "llama.cpp's preset Q5_K_M: q5_k, with q6_k for v and down of half of the blocks"
    source: ClassVar[str] = KQUANT_SOURCE
    preset: ClassVar[str] = "Q5_K_M"
    base: ClassVar[GgmlScheme] = Q5KScheme()


class _EvenMixture(GgmlMixture):
    def _chosen(self, place: Place) -> GgmlScheme:
        return self.base


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q3KSMixture(_EvenMixture):
    """Q3_K throughout, but for the head."""

    kind: ClassVar[str] = "q3_k_s"
    summary: ClassVar[str] = "llama.cpp's preset Q3_K_S: q3_k, with q6_k for the head"
    source: ClassVar[str] = KQUANT_SOURCE
    preset: ClassVar[str] = "Q3_K_S"
    base: ClassVar[GgmlScheme] = Q3KScheme()


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q5KSMixture(_EvenMixture):
    """Q5_K throughout, but for the head."""

    kind: ClassVar[str] = "q5_k_s"
    summary: ClassVar[str] = "llama.cpp's preset Q5_K_S: q5_k, with q6_k for the head"
    source: ClassVar[str] = KQUANT_SOURCE
    preset: ClassVar[str] = "Q5_K_S"
    base: ClassVar[GgmlScheme] = Q5KScheme()


@SCHEMES.register
@dataclass(frozen=True, slots=True)
class Q6KMixture(_EvenMixture):
    """Q6_K throughout."""

    kind: ClassVar[str] = "q6_k_mix"
    summary: ClassVar[str] = "llama.cpp's preset Q6_K: q6_k, with 8 bits where it does not fit"
    source: ClassVar[str] = KQUANT_SOURCE
    preset: ClassVar[str] = "Q6_K"
    base: ClassVar[GgmlScheme] = Q6KScheme()
