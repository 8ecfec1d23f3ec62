"""bitsandbytes, 4 bits: what transformers writes for NF4 and FP4 and loads with bitsandbytes.

Two codes lie in a byte, the first in its upper half, in the order of the weight's rows. Beside them lie the scales
(``absmax``, of 8 bits under double quantization, with their own float32 scales ``nested_absmax``), the tables of both
(``quant_map``, ``nested_quant_map``), and as JSON in a tensor of bytes (``quant_state``) the rest: the shape, the
block sizes and the offset of the scales. See ``QuantState`` in https://github.com/bitsandbytes-foundation/bitsandbytes
and ``BitsAndBytesConfig`` in transformers. The tables and the JSON make up 1.3 kB for each layer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats import FORMATS
from quantkit.formats.base import Format
from quantkit.schemes import QuantizedWeight, Scheme
from quantkit.schemes.codebook import NESTED_BLOCK, CodebookScheme

if TYPE_CHECKING:
    import torch

ON_CPU = (
    "bitsandbytes: on a CPU with AVX512-BF16 its layers compute in bfloat16 with scales in bfloat16, whatever the "
    "model's dtype, and a layer whose output features are no multiple of 32 fails; GPUs and other CPUs do neither"
)


@FORMATS.register
class BitsAndBytes(Format):
    """The 4-bit layout of bitsandbytes.

    Layers compute in the dtype of the float model.
    """

    name = "bitsandbytes"
    summary = "nf4 and fp4, one scheme for all layers"
    runtimes = ("transformers", "vllm")
    requires = ("accelerate", "bitsandbytes")
    fused = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse what is not a codebook."""
        _codebook(scheme)

    @classmethod
    def check_together(cls, schemes: Collection[Scheme]) -> None:
        """One scheme for all layers."""
        if len(set(schemes)) > 1:
            raise SchemeError(
                f"the bitsandbytes format holds one scheme, not {', '.join(scheme.describe() for scheme in schemes)}",
                "give all layers the same scheme, or keep some float with 'ignore'",
            )

    @classmethod
    def computes_in(cls, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """On CPUs its layers compute in bfloat16 even in a float32 model."""
        return ("float16", "bfloat16")

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """Packed codes, scales, tables and state."""
        import torch

        scheme, codes = _codebook(weight.scheme), weight.codes.reshape(-1)
        tensors = {
            "weight": (codes[::2] << 4 | codes[1::2]).unsqueeze(1),
            "weight.absmax": weight.parts.get("absmax", weight.scales).flatten(),
            "weight.quant_map": torch.tensor(scheme.table, dtype=torch.float32),
        }
        state = {
            "quant_type": scheme.kind,
            "blocksize": scheme.group_size,
            "dtype": self.dtype,
            "shape": list(weight.codes.shape),
        }
        if scheme.double_quant:
            from quantkit.numerics.lattices.codebook import dynamic_table

            tensors["weight.nested_absmax"] = weight.parts["nested_absmax"]
            tensors["weight.nested_quant_map"] = dynamic_table(torch.device("cpu")).clone()
            state |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": float(weight.parts["nested_offset"]),
            }
        tensors[_state_suffix(scheme)] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of :meth:`pack`.

        Raises:
            CheckpointError: the state is not that of the scheme.
        """
        import torch

        from quantkit.numerics.lattices.codebook import nested_scales

        scheme = _codebook(scheme)
        state, packed = _read_state(tensors[_state_suffix(scheme)], scheme), tensors["weight"]
        codes = torch.cat([packed >> 4, packed & 15], dim=1).view(*state["shape"])
        scales, parts = tensors["weight.absmax"].view(codes.shape[0], -1), {}
        if scheme.double_quant:
            offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
            parts = {"absmax": scales, "nested_absmax": tensors["weight.nested_absmax"], "nested_offset": offset}
            scales = nested_scales(parts)
        return QuantizedWeight(scheme, codes, scales, torch.zeros(scales.shape, dtype=torch.uint8), parts)

    def layer_suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The suffixes of :meth:`pack`."""
        scheme = _codebook(scheme)
        nested = ("weight.nested_absmax", "weight.nested_quant_map") if scheme.double_quant else ()
        return ("weight", "weight.absmax", "weight.quant_map", *nested, _state_suffix(scheme))

    def quantization_config(self, layers: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """One scheme for all layers, and the names of those that stay float.

        Raises:
            SchemeError: there are several schemes, or transformers would take a quantized layer for a float one.
        """
        quantized = {name: _codebook(scheme) for name, scheme in layers.items() if scheme is not None}
        scheme = _only(quantized)
        skipped = [name for name in layers if name not in quantized]
        _check_skipped(skipped, quantized)
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": scheme.kind,
            "bnb_4bit_use_double_quant": scheme.double_quant,
            "bnb_4bit_compute_dtype": self.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": skipped,
            "llm_int8_threshold": 6.0,
        }

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """What bitsandbytes does on some CPUs."""
        return (ON_CPU,)


def _codebook(scheme: Scheme) -> CodebookScheme:
    if not isinstance(scheme, CodebookScheme):
        raise SchemeError(
            f"the bitsandbytes format does not store {scheme.describe()}",
            "it stores the schemes nf4 and fp4; use format compressed-tensors for others",
        )
    return scheme


def _state_suffix(scheme: CodebookScheme) -> str:
    return f"weight.quant_state.bitsandbytes__{scheme.kind}"


def _read_state(tensor: torch.Tensor, scheme: CodebookScheme) -> dict[str, Any]:
    """The state of a layer, if it is one of ``scheme``."""
    remedy = "the file is broken, or not one that quantkit wrote: quantize again"
    expected = {"quant_type": scheme.kind, "blocksize": scheme.group_size}
    if scheme.double_quant:
        expected["nested_blocksize"] = NESTED_BLOCK
    try:
        state: dict[str, Any] = json.loads(bytes(tensor.tolist()))
        found = {key: state[key] for key in expected}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"a quant_state of bitsandbytes cannot be read: {error!r}", remedy) from error
    if found != expected:
        raise CheckpointError(f"a quant_state of bitsandbytes is {found}, not {scheme.describe()}", remedy)
    return state


def _only(quantized: Mapping[str, CodebookScheme]) -> CodebookScheme:
    """The scheme of all layers."""
    examples: dict[CodebookScheme, str] = {}
    for name, scheme in quantized.items():
        examples.setdefault(scheme, name)
    if len(examples) > 1:
        found = ", ".join(f"{name} is {scheme.describe()}" for scheme, name in examples.items())
        raise SchemeError(
            f"a checkpoint in the bitsandbytes format has one scheme for all layers, and {found}",
            "give all layers the same scheme, or keep some float with 'ignore'",
        )
    return next(iter(examples))


def _check_skipped(skipped: Collection[str], quantized: Collection[str]) -> None:
    """Refuse names of float layers by which transformers would skip a quantized one: it looks at ends of names."""
    for name in quantized:
        if name.endswith(tuple(skipped)):
            taken = next(each for each in skipped if name.endswith(each))
            raise SchemeError(
                f"transformers would take {name} for a float layer in the bitsandbytes format, because {taken} is one",
                f"keep {name} float too with 'ignore', or quantize {taken}",
            )
