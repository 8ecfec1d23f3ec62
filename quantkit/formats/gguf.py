"""gguf: one file for llama.cpp and Ollama, with model, metadata and tokenizer.

A layer is the raw blocks of one GGML type, see :mod:`quantkit.gguf.blocks`; the file around them is written and
read by :mod:`quantkit.exports`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import SchemeError
from quantkit.formats import FORMATS
from quantkit.formats.base import FLOAT, Container, Format, PackedShapes
from quantkit.gguf.types import BLOCK, row_bytes, type_of
from quantkit.schemes import GgmlMixture, IntScheme, PlainScheme, QuantizedWeight, Scheme
from quantkit.schemes.ggml import SUPER_BLOCK, Iq4NlScheme

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

IMPORTANCE = "importance"
"""The part of a weight, and the suffix beside its blocks, with the mean square of each input column."""
KINDS = ("mxfp4", "q2_k_mix", "q3_k", "q4_k", "q5_k", "q6_k_mix", "iq4_nl", "q4_k_m", "q5_k_m", "q3_k_m")
MIXED = ("q4_k_m", "q5_k_m", "q3_k_m", "q6_k_mix", "q2_k_mix")
"""Mixtures, one for every width; they fit rows of any length that 32 divides."""
TYPES = ("q2_k", "q3_k", "q4_k", "iq4_nl", "q4_1", "q5_k", "q5_0", "q5_1", "q6_k", "q8_0")
"""Types that llama.cpp takes for any tensor of a file; Q4_0 has the bits of IQ4_NL and is less near to weights."""
TURNED = "llama.cpp computes with the keys' part of it transposed, head by head"
REPEATED = "gguf: the file repeats the scale of a group in every block of 32, which takes the bits of group_size 32"


@FORMATS.register
class Gguf(Format):
    """The block types of GGML."""

    name = "gguf"
    summary = "int4, int5 and int8 in blocks of 32 (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0), mxfp4, llama.cpp's own types"
    runtimes = ("llama.cpp", "ollama")
    embeddings = True
    shares_head = True
    beside = (f".{IMPORTANCE}",)
    container: ClassVar[Container] = "gguf"
    experts = "projection"
    usual = (
        {"group_size": BLOCK},
        {"group_size": BLOCK, "symmetric": False, "zeros": "float"},
        *({"scheme": kind} for kind in MIXED),
        {"scheme": "float"},
    )
    examples = (
        *({"bits": bits, "group_size": 32, "symmetric": True} for bits in (4, 5, 8)),
        *({"bits": bits, "group_size": 32, "symmetric": False, "zeros": "float"} for bits in (4, 5)),
        *({"scheme": kind} for kind in KINDS),
    )

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse what no block type holds; mixtures of llama.cpp and 16-bit floats have their types there too."""
        if not isinstance(scheme, GgmlMixture | PlainScheme):
            type_of(scheme)

    @classmethod
    def choices(cls, runtime: str | None = None) -> tuple[str, ...]:
        """Any tensor of a file may have any type whose blocks divide its rows."""
        return (*TYPES, FLOAT) if cls._serves(runtime) else ()

    @classmethod
    def tries(cls, scheme: Scheme, out_features: int, in_features: int) -> bool:
        """Where rows are whole super-blocks, K-quants have no more bits than blocks of 32 with as wide codes."""
        small = isinstance(scheme, Iq4NlScheme) or (isinstance(scheme, IntScheme) and scheme.bits < 8)
        return not small or in_features % SUPER_BLOCK != 0

    @classmethod
    def check_layer(cls, scheme: Scheme, out_features: int, in_features: int) -> None:
        """Refuse rows that are not whole blocks."""
        if in_features % BLOCK:
            raise SchemeError(
                f"gguf has blocks of {BLOCK} weights, and a row has {in_features}",
                "keep this layer float with 'ignore'",
            )

    @classmethod
    def keeps_float(cls, layers: Collection[str], config: PreTrainedConfig) -> dict[str, str]:
        """Those that the file holds in pieces that are no rows."""
        from quantkit.gguf.names import kept_whole

        return dict.fromkeys(kept_whole(layers, config), TURNED)

    @classmethod
    def scale_dtype(cls, dtype: str) -> str:
        """Blocks have float16 scales whatever the model's dtype is."""
        return "float16"

    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Scales rounded to float16, and for asymmetric groups the least value; see :class:`Integers`."""
        from quantkit.gguf.blocks import codec_of

        found = codec_of(weight.scheme).fitted(weight)
        beside = {name: part for name, part in weight.parts.items() if name == IMPORTANCE}
        return replace(found, parts={**found.parts, **beside})

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Raw blocks, ``weight`` uint8 ``[rows, row_bytes]``, and the weight's ``importance`` if it has one."""
        from quantkit.gguf.blocks import codec_of

        beside = {name: part for name, part in weight.parts.items() if name == IMPORTANCE}
        return {**codec_of(weight.scheme).pack(weight), **beside}

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of :meth:`pack`.

        Raises:
            CheckpointError: the blocks are not those of the scheme.
        """
        from quantkit.gguf.blocks import codec_of

        return codec_of(scheme).unpack(tensors)

    def packed_shapes(self, scheme: Scheme, out_features: int, in_features: int) -> PackedShapes:
        """Rows of whole blocks."""
        return {"weight": ("uint8", (out_features, row_bytes(scheme, in_features)))}

    def layer_suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The blocks, which are all that :meth:`unpack` needs."""
        return ("weight",)

    def quantization_config(self, layers: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """There is no ``config.json``."""
        return {}

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """Where a group costs as much as its blocks."""
        wide = any(isinstance(scheme, IntScheme) and scheme.group_size != BLOCK for scheme in schemes)
        return (REPEATED,) if wide else ()
