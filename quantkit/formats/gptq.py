"""gptq: the layout of AutoGPTQ and GPTQModel, which gptqmodel, transformers and vLLM load.

A weight lies transposed. ``qweight``, int32 ``[in * bits / 32, out]``, holds its codes as a dense stream of bits down
each column, ``qzeros``, int32 ``[groups, out * bits / 32]``, the zero points along each row, ``scales`` is
``[groups, out]``, and ``g_idx``, int32 ``[in]``, tells the group of each column of the weight. 3 bits are as dense.

``checkpoint_format`` tells the zero points: ``gptq`` stores each less one, ``gptq_v2`` as it is. A zero point of 0
cannot be told by the former, and gptqmodel takes asymmetric files of it from its own versions only, so that quantkit
writes ``gptq_v2`` where there are zero points to tell, and ``gptq``, which every loader knows, where all are the middle
of the codes. See ``gptqmodel/nn_modules/qlinear`` in https://github.com/ModelCloud/GPTQModel, version 7.7.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats import FORMATS
from quantkit.formats._gptq_layers import BITS, WORD, less_in, scheme_in, shifted_zeros
from quantkit.formats._per_layer import (
    BROKEN,
    FUSED,
    GROUPS_OF_VLLM,
    Rules,
    commonest,
    exceptions,
    holds_head,
    packed_layers,
    refused_by_vllm,
    settings,
)
from quantkit.formats.base import FLOAT, Format, PackedShapes
from quantkit.schemes import PER_CHANNEL, IntScheme, QuantizedWeight, Scheme
from quantkit.schemes.bitstream import pack_bits, unpack_bits
from quantkit.system.distribution import own_version

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint import CheckpointReader

GROUPS_OF_GPTQMODEL = (PER_CHANNEL, 16, 32, 64, 128, 256, 512, 1024)
ASYMMETRIC = (
    "asymmetric gptq: quantkit writes it as gptq_v2, which gptqmodel and transformers load; vLLM (tested: 0.32) loads "
    "symmetric gptq only, and a loader that does not look at checkpoint_format reads every zero point one too high"
)
OTHER_BITS = "gptq of 2 and 3 bits: gptqmodel and transformers load it, vLLM (0.32 is tested) 4 and 8 bits only"
DESC_ACT = "gptq with desc_act: gptqmodel and transformers load it, vLLM (0.32 is tested) refuses it"
MIXED = "gptq with several schemes: gptqmodel and vLLM load it, transformers does not read 'dynamic' and fails"
GROUPS = "gptq with groups of {}: gptqmodel loads {}, vLLM 32, 64 and 128, and both one scale per channel"


@FORMATS.register
class GptqFormat(Format):
    """Codes down the columns of the transposed weight, with zero points and a group for each column.

    Args:
        dtype: of the float model.
        less: what is taken off zero points before they are stored; None is 1 for symmetric schemes and 0 for others.
    """

    name = "gptq"
    summary = "int2, 3, 4, 8 grouped or per channel, desc_act, mixed by layer"
    runtimes = ("gptqmodel", "transformers", "vllm")
    packed_as = "replaced"
    requires = ("gptqmodel", "optimum")
    fused = FUSED
    experts = "all"
    examples = (
        *(
            {"bits": bits, "group_size": 32, "symmetric": symmetric}
            for bits in (2, 3, 4, 8)
            for symmetric in (True, False)
        ),
        {"bits": 4, "group_size": 32, "symmetric": True, "desc_act": True},
        {"overrides": {"down_proj": {"bits": 8}}, "bits": 4, "group_size": 32, "symmetric": True},
    )
    optional_suffixes: ClassVar[tuple[str, ...]] = ("g_idx",)
    """Tensors that a file may lack: without ``g_idx`` groups are neighbours."""

    def __init__(self, dtype: str = "float32", less: int | None = None) -> None:
        super().__init__(dtype)
        self._less = less

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse what has no codes of these widths with whole zero points along axis 1."""
        _integer(scheme)

    @classmethod
    def check_together(cls, schemes: Collection[Scheme]) -> None:
        """Symmetric and asymmetric layers need different ways of telling zero points."""
        if len({scheme.symmetric for scheme in schemes}) > 1:
            raise SchemeError(
                "a gptq checkpoint tells the zero points of all layers in one way, and symmetric and asymmetric "
                "schemes need different ones",
                "use the same 'symmetric' for all layers, or format compressed-tensors",
            )

    @classmethod
    def choices(cls, runtime: str | None = None) -> tuple[str, ...]:
        """All widths that loaders of ``dynamic`` take; transformers does not read that, and takes one beside floats."""
        return ("int4", FLOAT) if runtime == "transformers" else super().choices(runtime)

    @classmethod
    def check_layer(cls, scheme: Scheme, out_features: int, in_features: int) -> None:
        """Refuse a layer whose rows or columns do not fill whole words."""
        for what, count in (("output rows", out_features), ("input columns", in_features)):
            if count * scheme.bits % WORD:
                raise SchemeError(
                    f"{count} {what} of {scheme.bits} bits do not fill whole words of {WORD} bits, as gptq packs them",
                    "keep the layer float with 'ignore', or use format compressed-tensors",
                )

    @classmethod
    def refusal(cls, runtime: str, schemes: Collection[Scheme]) -> str | None:
        """Groups for which vLLM has no kernels, and layers that are asymmetric or have their columns in an order."""
        if runtime != "vllm":
            return None
        found = refused_by_vllm(cls.name, schemes)
        if found is None and any(not scheme.symmetric or _integer(scheme).desc_act for scheme in schemes):
            return f"vLLM loads {cls.name} files that are symmetric and without `desc_act`, and this one is not."
        return found

    @classmethod
    def computes_in(cls, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """Transformers loads one scheme only, with groups that gptqmodel has kernels for."""
        if len(set(schemes)) > 1 or any(scheme.group_size not in GROUPS_OF_GPTQMODEL for scheme in schemes):
            return ()
        return super().computes_in(schemes)

    @classmethod
    def scale_dtype(cls, dtype: str) -> str:
        """16 bits, as kernels have them."""
        return "bfloat16" if dtype == "bfloat16" else "float16"

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether ``quant_method`` is gptq."""
        return str(config.get("quant_method")).lower() == cls.name

    @classmethod
    def for_config(cls, config: Mapping[str, Any], dtype: str) -> Format:
        """With zero points as its ``checkpoint_format`` tells them.

        Raises:
            CheckpointError: quantkit does not read this ``checkpoint_format``.
        """
        return cls(dtype, less_in(config))

    @classmethod
    def schemes_in(cls, config: Mapping[str, Any], reader: CheckpointReader) -> dict[str, Scheme]:
        """The layers that have a ``qweight``; whether groups are neighbours is told by ``g_idx`` alone."""
        less_in(config)
        rules = Rules(config)
        layers = packed_layers(reader, ("qzeros", "scales"))
        return {layer: scheme_in(layer, rules, reader) for layer in layers}

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Codes, zero points, scales and the group of each column."""
        import torch

        scheme, columns = _integer(weight.scheme), weight.codes.shape[1]
        neighbours = torch.arange(columns, dtype=torch.int32) // scheme.columns_per_group(columns)
        zeros = pack_bits(weight.zeros.T.contiguous(), scheme.bits)
        return {
            "qweight": pack_bits(weight.codes, scheme.bits).T.contiguous(),
            "qzeros": shifted_zeros(zeros, scheme.bits, -self._taken_off(scheme)),
            "scales": weight.scales.T.contiguous(),
            "g_idx": weight.parts["g_idx"].to(torch.int32) if scheme.desc_act else neighbours,
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of :meth:`pack`; ``g_idx`` may be missing where groups are neighbours.

        Raises:
            CheckpointError: a symmetric layer has other zero points than the middle of its codes.
        """
        found, bits = _integer(scheme), scheme.bits
        words, scales = tensors["qweight"], tensors["scales"]
        codes = unpack_bits(words.T.contiguous(), bits, words.shape[0] * WORD // bits)
        plain = shifted_zeros(tensors["qzeros"], bits, self._taken_off(found))
        zeros = unpack_bits(plain, bits, scales.shape[1]).T.contiguous()
        if found.symmetric and not bool((zeros == found.zero).all()):
            raise CheckpointError(f"a symmetric {bits}-bit layer has zero points that are not {found.zero}", BROKEN)
        parts = {"g_idx": tensors["g_idx"]} if found.desc_act else {}
        return QuantizedWeight(found, codes, scales.T.contiguous(), zeros, parts)

    def layer_shape(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor], scheme: Scheme
    ) -> tuple[int, int]:
        """From the shapes of the packed tensors; see :meth:`Format.layer_shape`."""
        words, rows = shapes["qweight"]
        return rows, words * WORD // scheme.bits

    def packed_shapes(self, scheme: Scheme, out_features: int, in_features: int) -> PackedShapes:
        """Words of codes and zero points, scales, and a number for each column."""
        groups = scheme.groups(in_features)
        return {
            "qweight": ("int32", (-(-in_features * scheme.bits // WORD), out_features)),
            "qzeros": ("int32", (groups, -(-out_features * scheme.bits // WORD))),
            "scales": (self.scale_dtype(self.dtype), (groups, out_features)),
            "g_idx": ("int32", (in_features,)),
        }

    def layer_suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The suffixes of :meth:`pack`."""
        return ("qweight", "qzeros", "scales", "g_idx")

    def quantization_config(self, layers: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """The scheme of most layers, and what differs from it.

        Raises:
            SchemeError: symmetric and asymmetric layers are mixed.
        """
        found = {name: None if scheme is None else _integer(scheme) for name, scheme in layers.items()}
        packed = {name: scheme for name, scheme in found.items() if scheme is not None}
        self.check_together(packed.values())
        scheme = commonest(packed.values())
        return {
            "quant_method": self.name,
            "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
            **settings(scheme),
            "lm_head": holds_head(packed),
            "pack_dtype": "int32",
            **exceptions(found),
            "meta": {"quantizer": [f"quantkit:{own_version()}"]},
        }

    def extra_files(self, layers: Mapping[str, Scheme | None]) -> dict[str, str]:
        """``quantize_config.json``, where loaders of gptq look first."""
        return {"quantize_config.json": json.dumps(self.quantization_config(layers), indent=2) + "\n"}

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """What does not load everywhere."""
        found = [_integer(scheme) for scheme in schemes]
        odd = sorted({scheme.group_size for scheme in found} - set(GROUPS_OF_VLLM))
        sizes = ", ".join(str(size) for size in GROUPS_OF_GPTQMODEL if size != PER_CHANNEL)
        remarks = {
            ASYMMETRIC: any(not scheme.symmetric for scheme in found),
            OTHER_BITS: any(scheme.bits in (2, 3) for scheme in found),
            DESC_ACT: any(scheme.desc_act for scheme in found),
            GROUPS.format(", ".join(map(str, odd)), sizes): bool(odd),
            MIXED: len(set(found)) > 1,
        }
        return tuple(remark for remark, holds in remarks.items() if holds)

    def _taken_off(self, scheme: IntScheme) -> int:
        return int(scheme.symmetric) if self._less is None else self._less


def _integer(scheme: Scheme) -> IntScheme:
    plain = isinstance(scheme, IntScheme) and scheme.axis == 1 and scheme.zeros == "int" and scheme.activations is None
    if isinstance(scheme, IntScheme) and plain and scheme.bits in BITS:
        return scheme
    raise SchemeError(
        f"the gptq format does not store {scheme.describe()}",
        "it stores int schemes of 2, 3, 4 and 8 bits along axis 1 with zeros: int and without activations",
    )
