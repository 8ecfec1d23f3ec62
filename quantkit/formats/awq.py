"""awq: the ``gemm`` layout of AutoAWQ, which vLLM loads, and gptqmodel and transformers with it.

A weight lies transposed: ``qweight``, int32 ``[in, out / 8]``, ``qzeros``, int32 ``[groups, out / 8]``, and ``scales``,
``[groups, out]``. Eight codes lie in a word, from its lowest bits on those of rows 0, 2, 4, 6, 1, 3, 5, 7. Zero points
are stored as they are, also where a scheme is symmetric and all are 8. See ``awq/modules/linear/gemm.py`` in
https://github.com/casper-hansen/AutoAWQ, version 0.2.9.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats import FORMATS
from quantkit.formats._per_layer import (
    FUSED,
    Rules,
    columns_per_group,
    commonest,
    holds_head,
    kept_float,
    packed_layers,
    refused_by_vllm,
    require,
    require_matrix,
)
from quantkit.formats.base import EXPERT, Format, PackedShapes
from quantkit.schemes import PER_CHANNEL, IntScheme, QuantizedWeight, Scheme
from quantkit.schemes.bitstream import pack_bits, unpack_bits

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint import CheckpointReader

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight neighbours lies in each place of a word."""
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""The inverse of :data:`ORDER`."""
BITS = 4
TOGETHER = 8
SUFFIXES = ("qweight", "qzeros", "scales")
GROUPS = (PER_CHANNEL, 16, 32, 64, 128)
"""Group sizes that gptqmodel has kernels for."""
OTHER_GROUPS = "awq with groups of {}: gptqmodel and transformers load 16, 32, 64, 128 and one scale per channel"


@FORMATS.register
class AwqFormat(Format):
    """AutoAWQ's layout for its ``gemm`` kernels."""

    name = "awq"
    summary = "int4 grouped or per channel, one scheme for all layers"
    runtimes = ("gptqmodel", "transformers", "vllm")
    packed_as = "replaced"
    requires = ("accelerate", "gptqmodel")
    fused = FUSED
    experts = "all"
    examples = tuple({"bits": 4, "group_size": 32, "symmetric": symmetric} for symmetric in (True, False))

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse what has no 4-bit codes with whole zero points along axis 1."""
        _integer(scheme)

    @classmethod
    def check_together(cls, schemes: Collection[Scheme]) -> None:
        """One group size for all layers, and as a rule one scheme."""
        if len(set(schemes)) > 1:
            raise SchemeError(
                f"the awq format holds one scheme, not {', '.join(scheme.describe() for scheme in schemes)}",
                "give all layers the same scheme, or keep some float with 'ignore'",
            )

    @classmethod
    def check_layer(cls, scheme: Scheme, out_features: int, in_features: int) -> None:
        """Refuse a layer whose rows do not fill whole words."""
        if out_features % TOGETHER:
            raise SchemeError(
                f"awq packs {TOGETHER} output rows into a word, and the layer has {out_features}",
                "keep the layer float with 'ignore', or use format compressed-tensors",
            )

    @classmethod
    def refusal(cls, runtime: str, schemes: Collection[Scheme]) -> str | None:
        """Groups for which vLLM has no kernels."""
        return refused_by_vllm(cls.name, schemes) if runtime == "vllm" else None

    @classmethod
    def computes_in(cls, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """Transformers loads groups that gptqmodel has kernels for."""
        return super().computes_in(schemes) if all(scheme.group_size in GROUPS for scheme in schemes) else ()

    @classmethod
    def scale_dtype(cls, dtype: str) -> str:
        """16 bits, as kernels have them."""
        return "bfloat16" if dtype == "bfloat16" else "float16"

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether ``quant_method`` is awq."""
        return str(config.get("quant_method")).lower() == cls.name

    @classmethod
    def schemes_in(cls, config: Mapping[str, Any], reader: CheckpointReader) -> dict[str, Scheme]:
        """The layers that have a ``qweight``; all are read as asymmetric, whatever their zero points."""
        stored = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm").lower()
        if stored != "gemm":
            raise CheckpointError(
                f"an awq checkpoint of version '{stored}' is laid out for one kind of kernel",
                "quantkit reads version gemm: get the model in it",
            )
        rules = Rules(config)
        return {layer: _scheme_in(layer, rules, reader) for layer in packed_layers(reader, SUFFIXES)}

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Codes, zero points and scales."""
        return {
            "qweight": _packed(weight.codes.T),
            "qzeros": _packed(weight.zeros.T),
            "scales": weight.scales.T.contiguous(),
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of :meth:`pack`."""
        codes, zeros = (_unpacked(tensors[suffix]).T.contiguous() for suffix in ("qweight", "qzeros"))
        return QuantizedWeight(_integer(scheme), codes, tensors["scales"].T.contiguous(), zeros)

    def layer_shape(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor], scheme: Scheme
    ) -> tuple[int, int]:
        """From the shapes of the packed tensors; see :meth:`Format.layer_shape`."""
        columns, words = shapes["qweight"]
        return words * TOGETHER, columns

    def packed_shapes(self, scheme: Scheme, out_features: int, in_features: int) -> PackedShapes:
        """Eight codes or zero points to a word, and scales."""
        groups, words = scheme.groups(in_features), out_features // TOGETHER
        return {
            "qweight": ("int32", (in_features, words)),
            "qzeros": ("int32", (groups, words)),
            "scales": (self.scale_dtype(self.dtype), (groups, out_features)),
        }

    def layer_suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The suffixes of :meth:`pack`."""
        return SUFFIXES

    def quantization_config(self, layers: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """One scheme for all layers, and the names of those that stay float, for gptqmodel as ``dynamic``.

        Raises:
            SchemeError: there are several schemes, or loaders would take a packed layer for a float one.
        """
        packed = {name: _integer(scheme) for name, scheme in layers.items() if scheme is not None}
        self.check_together(dict.fromkeys(packed.values()))
        kept = [name for name in layers if name not in packed]
        stacks = [match["stack"] for name in kept if (match := EXPERT.match(name))]
        kept = [*dict.fromkeys(stacks), *kept]
        _check_kept(kept, packed)
        return {
            "quant_method": self.name,
            "version": "gemm",
            "bits": BITS,
            "group_size": commonest(packed.values()).group_size,
            "zero_point": True,
            "lm_head": holds_head(packed),
            "modules_to_not_convert": kept,
            **({"dynamic": dynamic} if (dynamic := kept_float(layers)) else {}),
        }

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """Group sizes that do not load everywhere."""
        odd = sorted({scheme.group_size for scheme in schemes} - set(GROUPS))
        return (OTHER_GROUPS.format(", ".join(map(str, odd))),) if odd else ()


def _integer(scheme: Scheme) -> IntScheme:
    if isinstance(scheme, IntScheme) and scheme in (
        IntScheme(BITS, scheme.group_size, symmetric) for symmetric in (True, False)
    ):
        return scheme
    raise SchemeError(
        f"the awq format does not store {scheme.describe()}",
        "it stores int schemes of 4 bits along axis 1 with zeros: int and without desc_act; for others use gptq",
    )


def _packed(matrix: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n, out]`` below 16 to int32 ``[n, out / 8]``."""
    count = matrix.shape[0]
    return pack_bits(matrix.reshape(count, -1, TOGETHER)[:, :, ORDER].reshape(count, -1), BITS)


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_packed`."""
    count = words.shape[0]
    flat = unpack_bits(words, BITS, words.shape[1] * TOGETHER)
    return flat.reshape(count, -1, TOGETHER)[:, :, PLACES].reshape(count, -1)


def _check_kept(kept: Collection[str], packed: Collection[str]) -> None:
    """Refuse names of float layers by which loaders would skip a packed one: they look for parts of names."""
    for name in packed:
        for each in kept:
            if each in name:
                raise SchemeError(
                    f"loaders would take {name} for a float layer in the awq format, because {each} is one",
                    f"keep {name} float too with 'ignore', or quantize {each}",
                )


def _scheme_in(layer: str, rules: Rules, reader: CheckpointReader) -> IntScheme:
    """The scheme of a layer, whose tensors are as it asks for."""
    import torch

    said = rules.of(layer)
    if said.bits != BITS:
        raise CheckpointError(f"layer {layer} has {said.bits} bits", "quantkit reads awq of 4 bits")
    columns, words = require_matrix(reader, f"{layer}.qweight")
    groups = columns // columns_per_group(layer, said.group_size, columns)
    require(reader, f"{layer}.qweight", (torch.int32,), (columns, words))
    require(reader, f"{layer}.qzeros", (torch.int32,), (groups, words))
    floats = (torch.float16, torch.bfloat16, torch.float32)
    require(reader, f"{layer}.scales", floats, (groups, words * TOGETHER))
    return IntScheme(BITS, said.group_size, symmetric=False)
