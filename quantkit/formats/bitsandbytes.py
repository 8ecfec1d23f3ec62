"""bitsandbytes: what transformers writes for NF4, FP4 and LLM.int8 and loads with bitsandbytes.

See ``BitsAndBytesConfig`` in transformers, and :mod:`quantkit.formats._bitsandbytes` for the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quantkit.errors import CheckpointError, SchemeError
from quantkit.formats import FORMATS
from quantkit.formats._bitsandbytes import INT8, STATE, layout_of, read_state
from quantkit.formats.base import Format, PackedShapes
from quantkit.schemes import QuantizedWeight, Scheme, make_scheme
from quantkit.schemes.codebook import NESTED_BLOCK
from quantkit.schemes.rounding import InputRounding

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint import CheckpointReader

GET_AGAIN = "the file is broken: get it again"


@FORMATS.register
class BitsAndBytes(Format):
    """The layouts of bitsandbytes.

    4-bit layers compute in the dtype of the float model.

    Attributes:
        outliers: columns of inputs of 8-bit layers with such a magnitude are multiplied in 16 bits.
    """

    name = "bitsandbytes"
    summary = "nf4, fp4 and int8 with rounded inputs, one scheme for all layers"
    runtimes = ("transformers", "vllm")
    untested: ClassVar[Mapping[str, str]] = {
        "vllm": "vLLM 0.32 does not load bitsandbytes; older releases do on CUDA, which quantkit has not tested."
    }
    usual = ({"scheme": "nf4"}, {"bits": 8, "group_size": -1, "activations": "dynamic"})
    examples = (
        {"scheme": "nf4"},
        {"scheme": "fp4"},
        {"scheme": "nf4", "double_quant": False},
        {"bits": 8, "group_size": -1, "activations": "dynamic"},
    )
    requires = ("accelerate", "bitsandbytes")
    varies = 4  # an offset in words has up to three more digits than most, which may move others
    fused = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

    outliers: float = 6.0

    @classmethod
    def for_config(cls, config: Mapping[str, Any], dtype: str) -> Format:
        """With the magnitude from which on columns of inputs are not rounded."""
        found = cls(dtype)
        found.outliers = float(config.get("llm_int8_threshold", cls.outliers))
        return found

    def input_rounding(self, scheme: Scheme) -> InputRounding | None:
        """Per token, but for columns that have outliers in a batch."""
        rounding = scheme.input_rounding
        return rounding and replace(rounding, outliers=self.outliers)

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse what has no layout."""
        layout_of(scheme)

    @classmethod
    def check_together(cls, schemes: Collection[Scheme]) -> None:
        """One scheme for all layers."""
        if len(set(schemes)) > 1:
            raise SchemeError(
                f"the bitsandbytes format holds one scheme, not {', '.join(scheme.describe() for scheme in schemes)}",
                "give all layers the same scheme, or keep some float with 'ignore'",
            )

    @classmethod
    def packages(cls, runtime: str, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """The package, for vLLM too."""
        return ("bitsandbytes",) if runtime == "vllm" else super().packages(runtime, schemes)

    @classmethod
    def author(cls, config: Mapping[str, Any], folder: Path) -> str | None:
        """transformers, which says its version."""
        version = config.get("transformers_version")
        return f"transformers {version}" if version else None

    @classmethod
    def computes_in(cls, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """On CPUs 4-bit layers compute in bfloat16 even in a float32 model; int8 ones give the model's dtype."""
        dtypes = [layout_of(scheme).computes_in for scheme in schemes]
        return min(dtypes, key=len, default=super().computes_in(schemes))

    @classmethod
    def scale_dtype(cls, dtype: str) -> str:
        """Scales are float32 in all layouts."""
        return "float32"

    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The nearest scales that the layout holds."""
        return layout_of(weight.scheme).fitted(weight)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """What says that it is of bitsandbytes, or as older files do, in how many bits it loads."""
        return config.get("quant_method", "bitsandbytes") == "bitsandbytes" and bool(
            config.get("load_in_4bit") or config.get("load_in_8bit")
        )

    @classmethod
    def schemes_in(cls, config: Mapping[str, Any], reader: CheckpointReader) -> dict[str, Scheme]:
        """The layers beside whose codes lie a 4-bit state or int8 scales."""
        return _schemes_of(reader)

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The tensors of the scheme's layout."""
        return layout_of(weight.scheme).pack(weight, self.dtype)

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of :meth:`pack`.

        Raises:
            CheckpointError: the tensors are not those of the scheme.
        """
        return layout_of(scheme).unpack(tensors)

    def layer_shape(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor], scheme: Scheme
    ) -> tuple[int, int]:
        """From the shapes of the packed tensors; see :meth:`Format.layer_shape`."""
        return layout_of(scheme).size(shapes, read)

    def packed_shapes(self, scheme: Scheme, out_features: int, in_features: int) -> PackedShapes:
        """As the scheme's layout has them; under double quantization a few bytes of text depend on the weight."""
        return layout_of(scheme).packed_shapes(out_features, in_features, self.dtype)

    def layer_suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The suffixes of :meth:`pack`."""
        return layout_of(scheme).suffixes

    def quantization_config(self, layers: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """One scheme for all layers, and the names of those that stay float.

        Raises:
            SchemeError: there are several schemes, or transformers would take a quantized layer for a float one.
        """
        quantized = {name: scheme for name, scheme in layers.items() if scheme is not None}
        layout = layout_of(_only(quantized))
        skipped = [name for name in layers if name not in quantized]
        _check_skipped(skipped, quantized)
        return {
            "quant_method": "bitsandbytes",
            **layout.config(self.dtype),
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": skipped,
            "llm_int8_threshold": self.outliers,
        }

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """What bitsandbytes does to inputs, and on some CPUs."""
        return tuple(dict.fromkeys(layout_of(scheme).remark for scheme in schemes))


def _only(quantized: Mapping[str, Scheme]) -> Scheme:
    """The scheme of all layers."""
    examples: dict[Scheme, str] = {}
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


def _schemes_of(reader: CheckpointReader) -> dict[str, Scheme]:
    """The packed layers, by full name.

    Raises:
        CheckpointError: the tensors of a layer do not fit each other, or blocks that quantkit does not read.
    """
    found: dict[str, Scheme] = {}
    for name in reader.names():
        layer, state, _ = name.partition(f".{STATE}")
        if state:
            found[layer] = _four_bit(reader, layer, name)
        elif name.endswith(".SCB"):
            layer = name.removesuffix(".SCB")
            found[layer] = _int8(reader, layer)
    if not found:
        raise CheckpointError(
            f"{reader.folder} says that it is quantized with bitsandbytes, and holds no packed layer",
            "save the model again after it was quantized",
        )
    return found


def _int8(reader: CheckpointReader, layer: str) -> Scheme:
    codes, scales = reader.shape(f"{layer}.weight"), reader.shape(f"{layer}.SCB")
    if len(codes) != 2 or math.prod(scales) != codes[0] or reader.dtype(f"{layer}.weight").itemsize != 1:
        raise CheckpointError(
            f"{layer}: weight {list(codes)} and SCB {list(scales)} are no int8 layer of bitsandbytes", GET_AGAIN
        )
    return INT8


def _four_bit(reader: CheckpointReader, layer: str, name: str) -> Scheme:
    """A scheme whose blocks fill the rows of the layer, as its tensors have it."""
    nested = f"{layer}.weight.nested_absmax" in reader
    try:
        state = read_state(reader.read(name))
        rows, columns = (int(size) for size in state["shape"])
        scheme = make_scheme(name.rpartition("__")[2], {"group_size": state["blocksize"], "double_quant": nested})
    except (CheckpointError, SchemeError) as error:
        raise CheckpointError(f"{layer}: {error.problem}", error.remedy) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{layer}: its quant_state cannot be read: {error!r}", GET_AGAIN) from error
    if columns % scheme.group_size:
        raise CheckpointError(
            f"{layer}: blocks of {scheme.group_size} weights run over the ends of its rows of {columns}",
            "quantkit reads blocks that fill rows; quantize this model with another block size",
        )
    _check_sizes(reader, layer, rows * columns, state, nested)
    return scheme


def _check_sizes(reader: CheckpointReader, layer: str, weights: int, state: dict[str, Any], nested: bool) -> None:
    """The tensors hold as many numbers as the state says."""
    blocks = weights // int(state["blocksize"])
    expected = {"weight.absmax": blocks}
    if nested:
        if state.get("nested_blocksize") != NESTED_BLOCK:
            raise CheckpointError(
                f"{layer}: its scales share one of their own in blocks of {state.get('nested_blocksize')}",
                f"quantkit reads blocks of {NESTED_BLOCK}",
            )
        expected["weight.nested_absmax"] = -(-blocks // NESTED_BLOCK)
    found = {suffix: math.prod(reader.shape(f"{layer}.{suffix}")) for suffix in expected}
    codes = reader.nbytes(f"{layer}.weight")
    if found != expected or codes * 2 != weights:
        raise CheckpointError(
            f"{layer}: {codes} bytes of codes and {found} do not fit a weight of {state['shape']}", GET_AGAIN
        )
