"""compressed-tensors: what llm-compressor writes and vLLM and transformers load.

The package (https://github.com/vllm-project/compressed-tensors) has a sub-format for every family of schemes, see
:mod:`quantkit.formats._compressed_tensors`; one checkpoint may hold several.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.formats import FORMATS
from quantkit.formats._compressed_tensors import Layout, embedding_layout_of, layout_of
from quantkit.formats.base import Format
from quantkit.schemes import Mxfp4Scheme, Nvfp4Scheme, QuantizedWeight, Scheme

if TYPE_CHECKING:
    import torch

MIXED = "mixed-precision"
"""The ``format`` of a checkpoint whose groups have several."""
ASYMMETRIC = (
    "asymmetric: vLLM loads 4 and 8 bits; transformers does with compressed-tensors below 0.18 (3 bits excepted), and "
    "with 0.18 to 0.20 fails on the shape of weight_zero_point, which quantkit's own evaluation works around"
)
FOUR_BIT_FLOATS = (
    "mxfp4 and nvfp4: compressed-tensors decodes them to bfloat16 whatever the model computes in, so that transformers "
    "needs dtype=torch.bfloat16 for them; in float32 its first forward pass fails"
)
EMBEDDING = "quantized input embedding: transformers loads it, vLLM does not"


@FORMATS.register
class CompressedTensors(Format):
    """The sub-formats of compressed-tensors for weights, with inputs as they are or rounded to 8 bits per token."""

    name = "compressed-tensors"
    summary = "int1-8 grouped or per channel, W8A8, fp8, mxfp4, nvfp4, mixed by layer"
    runtimes = ("transformers", "vllm")
    requires = ("compressed-tensors",)
    fused = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    embeddings = True

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse what no sub-format stores."""
        layout_of(scheme)

    @classmethod
    def check_embedding(cls, scheme: Scheme) -> None:
        """Refuse an embedding that transformers does not load."""
        embedding_layout_of(scheme)

    def for_embeddings(self) -> Format:
        """The same with the layouts of embeddings."""
        return _Embeddings(self.dtype)

    def _layout(self, scheme: Scheme) -> Layout:
        return layout_of(scheme)

    @classmethod
    def computes_in(cls, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """4-bit floats are decoded to bfloat16 whatever the model computes in."""
        return ("bfloat16",) if _has_four_bit_floats(schemes) else super().computes_in(schemes)

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The tensors of the scheme's sub-format."""
        return self._layout(weight.scheme).pack(weight)

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""
        return self._layout(scheme).unpack(tensors)

    def layer_suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The suffixes of :meth:`pack`."""
        return self._layout(scheme).suffixes

    def quantization_config(self, layers: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """One config group per scheme; a single one targets every Linear, several name their layers."""
        schemes = list(dict.fromkeys(scheme for scheme in layers.values() if scheme is not None))
        groups = {}
        for index, scheme in enumerate(schemes):
            names = [name for name, of_layer in layers.items() if of_layer == scheme]
            groups[f"group_{index}"] = _config_group(layout_of(scheme), ["Linear"] if len(schemes) == 1 else names)
        return {
            "quant_method": "compressed-tensors",
            "format": _common_format(groups),
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [name for name, scheme in layers.items() if scheme is None],
            "kv_cache_scheme": None,
        }

    def with_embedding(self, config: dict[str, Any], name: str, scheme: Scheme) -> dict[str, Any]:
        """A group of its own, with the full name of the embedding: a model may have others that stay float."""
        groups = dict(config["config_groups"])
        groups[f"group_{len(groups)}"] = _config_group(embedding_layout_of(scheme), [name])
        return {**config, "format": _common_format(groups), "config_groups": groups}

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """What does not load everywhere."""
        remarks = {
            ASYMMETRIC: not all(scheme.symmetric for scheme in schemes),
            FOUR_BIT_FLOATS: _has_four_bit_floats(schemes),
        }
        return tuple(remark for remark, holds in remarks.items() if holds)


def _has_four_bit_floats(schemes: Collection[Scheme]) -> bool:
    return any(isinstance(scheme, Mxfp4Scheme | Nvfp4Scheme) for scheme in schemes)


class _Embeddings(CompressedTensors):
    """Packs and unpacks input embeddings."""

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """Who loads them."""
        return (EMBEDDING,) if schemes else ()

    def _layout(self, scheme: Scheme) -> Layout:
        return embedding_layout_of(scheme)


def _common_format(groups: Mapping[str, Mapping[str, Any]]) -> str:
    formats = {group["format"] for group in groups.values()}
    return formats.pop() if len(formats) == 1 else MIXED


def _config_group(layout: Layout, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": layout.weight_args(),
        "input_activations": layout.input_args(),
        "output_activations": None,
        "format": layout.name,
    }
