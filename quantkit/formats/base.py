"""What a format is: codes in, tensors and a config out, and back."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from quantkit.errors import CheckpointError, SchemeError
from quantkit.schemes import DEFAULT_KIND, Decodable, IntScheme, PlainScheme, QuantizedWeight, Scheme, make_scheme
from quantkit.schemes.rounding import CacheRounding, InputRounding

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from quantkit.checkpoint import CheckpointReader

Container = Literal["safetensors", "gguf"]
Experts = Literal["none", "projection", "all"]
EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<index>\d+)\.(?P<leaf>.+)$")
"""The name of a layer that is one expert's."""
FLOAT = "float"
"""The choice of a mix that leaves layers as they are."""
PackedShapes = dict[str, tuple[str, tuple[int, ...]]]
"""By suffix, a tensor's dtype as torch names it and its shape."""
BYTES = {
    **dict.fromkeys(("uint8", "int8", "float8_e4m3fn"), 1),
    **dict.fromkeys(("float16", "bfloat16", "int16"), 2),
    **dict.fromkeys(("int32", "float32"), 4),
    "int64": 8,
}
"""By the name of a dtype, the bytes of one value."""


class Format(ABC):
    """Stores quantized weights as a runtime expects them.

    Args:
        dtype: of the float model.

    Attributes:
        name: what recipes call it.
        summary: one line for ``quantkit formats``.
        runtimes: who loads it, by the names of quantkit's runtimes or in words, such as ``transformers 4`` or
            ``ollama``.
        untested: those of :attr:`runtimes` that load it as their authors say and no test has, each with a sentence on
            it.
        requires: the packages without which transformers cannot load it.
        decoded_at_first_use: whether transformers decodes its weights in its first forward pass, and keeps them so.
        decoding_config: the class of transformers' configs with ``dequantize=True``, by which packed layers are loaded
            decoded, where PEFT finds no weights in them otherwise; else empty.
        usual: the keys of a scheme that a variant of this format has where it does not give them: the first of these
            that suit what it gives.
        caches: in what runtimes store keys and values as a file of it says, names of
            :data:`quantkit.schemes.rounding.CACHES`.
        turning: who turns the inputs of layers as a file of it says, see
            :meth:`quantkit.transforms.base.Change.input_turn`; of :attr:`runtimes`.
        examples: the keys of schemes as a variant gives them, one of every kind, which the matrix tries.
        fused: names of layers beside each other that runtimes load as one matrix, so that they must agree in scheme.
        experts: which layers of a block's experts runtimes load as one tensor, and so in one scheme: all, or those of a
            projection; none where each may have its own.
        embeddings: whether it stores a quantized input embedding, in the schemes of :meth:`check_embedding`.
        optional_suffixes: of tensors that files of other tools may lack.
        shares_head: whether a quantized input embedding can be the output head as well, where a model ties them.
        varies: bytes by which a layer may take more than :meth:`layer_bytes` says, where the weight has a say in it.
        beside: suffixes of tensors that :meth:`pack` gives and the weight does not need; they count for nothing.
        container: a folder of safetensors that transformers could read, or one GGUF file.
        packed_as: what transformers makes of a layer's module: one without a weight (``emptied``), one of another kind
            (``replaced``); empty where it keeps a ``weight``, or transformers does not load the format.
        read_only: why quantkit does not write it, for a format that it only reads; empty for all others.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    runtimes: ClassVar[tuple[str, ...]]
    untested: ClassVar[Mapping[str, str]] = {}
    requires: ClassVar[tuple[str, ...]] = ()
    decoded_at_first_use: ClassVar[bool] = False
    decoding_config: ClassVar[str] = ""
    usual: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    caches: ClassVar[tuple[str, ...]] = ()
    turning: ClassVar[tuple[str, ...]] = ()
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    fused: ClassVar[tuple[tuple[str, ...], ...]] = ()
    experts: ClassVar[Experts] = "none"
    embeddings: ClassVar[bool] = False
    optional_suffixes: ClassVar[tuple[str, ...]] = ()
    shares_head: ClassVar[bool] = False
    varies: ClassVar[int] = 0
    beside: ClassVar[tuple[str, ...]] = ()
    container: ClassVar[Container] = "safetensors"
    packed_as: ClassVar[Literal["", "emptied", "replaced"]] = ""
    read_only: ClassVar[str] = ""

    @classmethod
    @abstractmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse a scheme that this format cannot store.

        Raises:
            SchemeError: with the schemes that it can.
        """

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = dtype

    @classmethod
    def check_embedding(cls, scheme: Scheme) -> None:
        """Refuse a scheme in which this format cannot store the input embedding.

        Raises:
            SchemeError: with the formats that store embeddings at all, or the schemes in which this one does.
        """
        from quantkit.formats import FORMATS

        if not cls.embeddings:
            able = ", ".join(each.name for each in FORMATS if each.embeddings)
            raise SchemeError(
                f"format {cls.name} does not store quantized embeddings", f"leave it out, or use one that does: {able}"
            )
        cls.check(scheme)

    def for_embeddings(self) -> Format:
        """What packs and unpacks the input embedding, where that differs from what does so for linear layers."""
        return self

    def with_embedding(self, config: dict[str, Any], name: str, scheme: Scheme) -> dict[str, Any]:
        """A ``quantization_config`` of linear layers with what there is to say of a quantized input embedding."""
        return config

    @classmethod
    def keeps_float(cls, layers: Collection[str], config: PreTrainedConfig) -> dict[str, str]:
        """The layers of a model that the format cannot hold packed wherever they lie, each with the reason.

        Args:
            layers: names.
            config: of the model.
        """
        return {}

    @classmethod
    def check_together(cls, schemes: Collection[Scheme]) -> None:
        """Refuse schemes that one checkpoint cannot hold side by side.

        Raises:
            SchemeError: with the way out.
        """

    @classmethod
    def choices(cls, runtime: str | None = None) -> tuple[str, ...]:
        """The schemes among which a mix chooses where its recipe names none, as a patch of a recipe names them.

        One file holds them side by side and the runtime serves it; whether a layer's shape suits, :meth:`check_layer`
        tells. By default they are the kinds of :attr:`examples`, each as long as it goes with those before it.

        Args:
            runtime: who shall load the file, a name of :attr:`runtimes` or ``reference``; None leaves that open, and
                any of them may.

        Returns:
            Names such as ``int4`` and ``q4_k``, from few bits to many, with ``float`` for layers that stay as they are;
            empty where the runtime serves no mix of this format.
        """
        if not cls._serves(runtime):
            return ()
        found: dict[str, Scheme] = {}
        for example in cls.examples:
            keys = {key: value for key, value in example.items() if key != "scheme"}
            if "overrides" in example:
                continue
            scheme = make_scheme(str(example.get("scheme", DEFAULT_KIND)), keys)
            name = f"int{scheme.bits}" if isinstance(scheme, IntScheme) else scheme.kind
            plain = isinstance(scheme, PlainScheme) or scheme.activations is not None
            if name not in found and not plain and cls._goes_with(runtime, [*found.values(), scheme]):
                found[name] = scheme
        return (*found, FLOAT) if found else ()

    @classmethod
    def tries(cls, scheme: Scheme, out_features: int, in_features: int) -> bool:
        """Whether a mix that names no choices tries a scheme, one of :meth:`choices`, on a layer of this shape.

        It need not where another choice that suits takes no more bits and is nearer to weights.
        """
        return True

    @classmethod
    def _serves(cls, runtime: str | None) -> bool:
        """Whether a runtime of this name may load it; quantkit's own decoder loads whatever quantkit writes."""
        return not cls.read_only and (runtime is None or runtime == "reference" or cls.loads_in(runtime))

    @classmethod
    def _goes_with(cls, runtime: str | None, schemes: Collection[Scheme]) -> bool:
        """Whether one file holds all these schemes, and the runtime serves it."""
        try:
            cls.check_together(schemes)
        except SchemeError:
            return False
        return runtime is None or cls.refusal(runtime, schemes) is None

    @classmethod
    def check_layer(cls, scheme: Scheme, out_features: int, in_features: int) -> None:
        """Refuse a layer whose shape this format cannot store in a scheme that it takes.

        Raises:
            SchemeError: with the way out.
        """

    @classmethod
    def loads_in(cls, runtime: str) -> bool:
        """Whether a runtime of this name loads it, as tests have seen."""
        return runtime in cls.runtimes and runtime not in cls.untested

    @classmethod
    def refusal(cls, runtime: str, schemes: Collection[Scheme]) -> str | None:
        """Why one of :attr:`runtimes` does not load a checkpoint with these schemes, a sentence; None where it does."""
        return None

    @classmethod
    def packages(cls, runtime: str, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """What pip has to install beside a runtime for a checkpoint with these schemes, with versions that work."""
        return cls.requires if runtime == "transformers" else ()

    @classmethod
    def computes_in(cls, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """The dtypes in which transformers runs a checkpoint with these schemes."""
        return ("float32", "float16", "bfloat16")

    @classmethod
    def scale_dtype(cls, dtype: str) -> str:
        """The dtype in which scales are solved and stored, for a float model of ``dtype``."""
        return dtype

    def fitted(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The nearest weight that this format can hold; most hold any of the schemes that they take.

        It decodes to exactly what :meth:`unpack` of :meth:`pack` decodes to.
        """
        return weight

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this ``quantization_config`` is of this format, whoever wrote it."""
        return False

    @classmethod
    def for_config(cls, config: Mapping[str, Any], dtype: str) -> Format:
        """What unpacks a checkpoint with this ``quantization_config`` and float tensors of ``dtype``."""
        return cls(dtype)

    @classmethod
    def author(cls, config: Mapping[str, Any], folder: Path) -> str | None:
        """Who wrote a checkpoint of this format; None where its files do not say.

        Args:
            config: its ``config.json``.
            folder: it.
        """
        return None

    @classmethod
    def schemes_in(cls, config: Mapping[str, Any], reader: CheckpointReader) -> dict[str, Scheme]:
        """The packed layers of a checkpoint that anybody wrote, by full name, with their schemes.

        Args:
            config: its ``quantization_config``.
            reader: its tensors.

        Raises:
            CheckpointError: config and tensors do not fit each other, or the file has what quantkit does not read.
        """
        raise CheckpointError(
            f"format {cls.name} is read by its manifest alone, and this checkpoint has none",
            "give a checkpoint that quantkit exported",
        )

    @abstractmethod
    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The tensors that stand for one layer's ``weight``, by the suffix of their names.

        The weight may lie on any device: what is as large as its codes stays there, small tensors may lie on the CPU.
        """

    @abstractmethod
    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of :meth:`pack`, from tensors as they were read from disk."""

    def decodable(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> Decodable:
        """What such tensors decode to; more than :meth:`unpack` where codes stand for groups of weights.

        Raises:
            ValueError: the tensors do not fit each other.
        """
        return self.unpack(tensors, scheme)

    @classmethod
    def cache_rounding(cls, config: Mapping[str, Any]) -> CacheRounding | None:
        """How a ``quantization_config`` asks runtimes to store keys and values; None where it does not."""
        return None

    @classmethod
    def with_cache(cls, config: dict[str, Any], rounding: CacheRounding) -> dict[str, Any]:
        """A ``quantization_config`` that asks for that; of a format whose :attr:`caches` have it."""
        raise NotImplementedError(f"{cls.name} says nothing of the KV cache")

    @classmethod
    def turns_in(cls, config: Mapping[str, Any]) -> dict[str, int]:
        """The layers whose inputs a ``quantization_config`` asks runtimes to turn, with the size of the matrices.

        Raises:
            CheckpointError: it asks for what quantkit does not have.
        """
        return {}

    @classmethod
    def with_turns(cls, config: dict[str, Any], turns: Mapping[str, int]) -> dict[str, Any]:
        """A ``quantization_config`` that asks for that; of a format that names who does it in :attr:`turning`."""
        raise NotImplementedError(f"{cls.name} says nothing of turned inputs")

    @classmethod
    def turn_refusal(cls, runtime: str) -> str | None:
        """Why a runtime does not turn the inputs of layers, a sentence; None where it does.

        Args:
            runtime: its name; ``reference`` does.
        """
        if runtime == "reference" or runtime in cls.turning:
            return None
        able = ", ".join((*cls.turning, "the reference decoder"))
        return f"{runtime} does not turn the inputs of layers as this file needs it; {able} does."

    def input_rounding(self, scheme: Scheme) -> InputRounding | None:
        """How runtimes round what a layer of a scheme is given; None where they leave it as it is."""
        return scheme.input_rounding

    def input_scale(self, read: Callable[[str], torch.Tensor], scheme: Scheme) -> torch.Tensor | None:
        """The static scale of a layer's inputs, float32 ``[1]``; None where it has none.

        Args:
            read: gives a tensor of the layer by suffix.
            scheme: of the layer.
        """
        return None

    def layer_shape(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor], scheme: Scheme
    ) -> tuple[int, int] | None:
        """``(out_features, in_features)`` of a packed layer; None where only its codes tell.

        Args:
            shapes: of its tensors, by suffix.
            read: gives a tensor by suffix; only small ones are asked for.
            scheme: of the layer.
        """
        return None

    @abstractmethod
    def packed_shapes(self, scheme: Scheme, out_features: int, in_features: int) -> PackedShapes:
        """The tensors that :meth:`pack` gives for a layer, told by arithmetic alone; not those of :attr:`beside`."""

    def layer_bytes(self, scheme: Scheme, out_features: int, in_features: int) -> int:
        """Bytes of these tensors."""
        found = self.packed_shapes(scheme, out_features, in_features)
        return sum(BYTES[dtype] * math.prod(shape) for dtype, shape in found.values())

    @abstractmethod
    def layer_suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The suffixes that :meth:`pack` uses for a scheme."""

    @abstractmethod
    def quantization_config(self, layers: Mapping[str, Scheme | None]) -> dict[str, Any]:
        """``quantization_config`` of ``config.json``; layers that stay float map to None."""

    def extra_files(self, layers: Mapping[str, Scheme | None]) -> dict[str, str]:
        """Further files of a checkpoint, name to text, besides ``config.json``."""
        return {}

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """What someone who loads a checkpoint with these schemes should know."""
        return ()
