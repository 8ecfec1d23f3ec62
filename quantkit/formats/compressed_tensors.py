"""compressed-tensors: what llm-compressor writes and vLLM and transformers load.

The package (https://github.com/vllm-project/compressed-tensors) has a sub-format for every family of schemes, see
:mod:`quantkit.formats._compressed_tensors`; one checkpoint may hold several.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError
from quantkit.formats import FORMATS
from quantkit.formats._compressed_tensors import Layout, embedding_layout_of, layout_of
from quantkit.formats._compressed_tensors.layout import STATIC_OBSERVER, quantization_args
from quantkit.formats._per_layer import BITS_OF_VLLM, FUSED
from quantkit.formats.base import FLOAT, Format, PackedShapes
from quantkit.schemes import PER_CHANNEL, IntScheme, Mxfp4Scheme, Nvfp4Scheme, QuantizedWeight, Scheme
from quantkit.schemes.rounding import CACHES, INPUT_SCALE, CacheRounding

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint import CheckpointReader
    from quantkit.formats._compressed_tensors.reading import Group

MIXED = "mixed-precision"
"""The ``format`` of a checkpoint whose groups have several."""
ASYMMETRIC = (
    "asymmetric: vLLM loads 4 and 8 bits; transformers does with compressed-tensors below 0.18 (3 bits excepted), and "
    "with 0.18 to 0.20 fails on the shape of weight_zero_point, which quantkit's own evaluation works around"
)
OTHER_BITS = (
    "integers of other widths than 4 and 8: transformers loads them; vLLM 0.32 reads them and computes with them on "
    "CUDA alone (its Humming kernels, which are not tested), and older releases refuse them"
)
FOUR_BIT_FLOATS = (
    "mxfp4 and nvfp4: compressed-tensors decodes them to bfloat16 whatever the model computes in, so that transformers "
    "needs dtype=torch.bfloat16 for them; in float32 its first forward pass fails"
)
FP8_INPUTS = (
    "4-bit integers with inputs in fp8: vLLM 0.32 computes with them on Hopper GPUs alone, in groups of 128; "
    "transformers loads them anywhere"
)
INT8_INPUTS = (
    "integers of fewer than 8 bits, or in groups, with inputs in int8: vLLM 0.32 computes with them on CUDA alone (its "
    "Humming kernels, which are not tested); llm-compressor stores their codes in whole bytes (int-quantized)"
)
FOUR_BIT_INPUTS = (
    "inputs in mxfp4 or nvfp4: vLLM multiplies in 4 bits on Blackwell GPUs, and computes on older ones with the "
    "weights alone or emulates the rounding; it has no kernels for CPUs"
)
KV_CACHE = "runtimes store the KV cache as the file says (kv_cache_scheme), in a way that quantkit does not read"
MIXED_BITS = (2, 3, 4, 5, 6, 8)
"""Of the integers among which a mix chooses."""
EMBEDDING = "quantized input embedding: transformers loads it, vLLM does not"


@FORMATS.register
class CompressedTensors(Format):
    """The sub-formats of compressed-tensors for weights, with inputs as they are or rounded to 8 or 4 bits."""

    name = "compressed-tensors"
    decoding_config = "CompressedTensorsConfig"
    summary = "int1-8 grouped or per channel, fp8, mxfp4, nvfp4, inputs rounded to 8 or 4 bits too, mixed by layer"
    runtimes = ("transformers", "vllm")
    requires = ("compressed-tensors",)
    decoded_at_first_use = True
    caches = tuple(CACHES)
    turning = ("vllm",)
    examples = (
        *({"bits": bits, "group_size": 32, "symmetric": symmetric} for bits in (4, 8) for symmetric in (True, False)),
        {"bits": 8, "group_size": -1},
        {"overrides": {"down_proj": {"bits": 8}}, "bits": 4, "group_size": 32, "symmetric": True},
        {"bits": 8, "group_size": -1, "activations": "dynamic"},
        *({"scheme": "fp8", "granularity": shape} for shape in ("tensor", "channel", "block")),
        {"scheme": "fp8", "granularity": "channel", "activations": "dynamic"},
        *({"scheme": kind} for kind in ("mxfp4", "nvfp4")),
        {"bits": 8, "group_size": -1, "activations": "static"},
        {"bits": 4, "group_size": 32, "activations": "dynamic"},
        {"bits": 4, "group_size": 32, "activations": "fp8"},
        {"scheme": "fp8", "granularity": "tensor", "activations": "static"},
        {"scheme": "mxfp4", "activations": "dynamic"},
        {"scheme": "nvfp4", "activations": "static"},
    )
    fused = FUSED
    experts = "all"
    embeddings = True
    packed_as = "emptied"

    @classmethod
    def check(cls, scheme: Scheme) -> None:
        """Refuse what no sub-format stores."""
        layout_of(scheme)

    @classmethod
    def choices(cls, runtime: str | None = None) -> tuple[str, ...]:
        """Integers, for vLLM of those bits alone that most of its releases load; others are there to be named.

        At the bits of fp8, nvfp4 and mxfp4 integers with groups are as near or nearer to the weights, on any device.
        """
        bits = BITS_OF_VLLM if runtime == "vllm" else MIXED_BITS
        return (*(f"int{each}" for each in bits), FLOAT) if cls._serves(runtime) else ()

    @classmethod
    def refusal(cls, runtime: str, schemes: Collection[Scheme]) -> str | None:
        """Integers of 1 bit, of which vLLM knows nothing."""
        narrow = any(isinstance(scheme, IntScheme) and scheme.bits == 1 for scheme in schemes)
        if runtime != "vllm" or not narrow:
            return None
        return f"vLLM loads integers of 2 to 8 bits from {cls.name} files, and this one has others."

    @classmethod
    def check_embedding(cls, scheme: Scheme) -> None:
        """Refuse an embedding that transformers does not load."""
        embedding_layout_of(scheme)

    def for_embeddings(self) -> Format:
        """The same with the layouts of embeddings."""
        return _Embeddings(self.dtype)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """What says that it is of compressed-tensors."""
        return config.get("quant_method") == cls.name

    @classmethod
    def author(cls, config: Mapping[str, Any], folder: Path) -> str | None:
        """The package with its version, or llm-compressor, whose recipe lies beside the weights."""
        by = f"compressed-tensors {config['quantization_config'].get('version', '')}".strip()
        return f"llm-compressor ({by})" if _is_llm_compressor(folder) else by

    @classmethod
    def for_config(cls, config: Mapping[str, Any], dtype: str) -> Format:
        """Layouts as the config groups name them.

        Raises:
            CheckpointError: a group is broken, or has what quantkit does not read.
        """
        return _Described(config, dtype)

    @classmethod
    def schemes_in(cls, config: Mapping[str, Any], reader: CheckpointReader) -> dict[str, Scheme]:
        """The layers that have packed codes, each with the scheme of the group that targets it."""
        from quantkit.formats._compressed_tensors.reading import groups_in, layers_in

        ignore = config.get("ignore") or ()
        return layers_in(groups_in(config), map(str, ignore), reader)

    def layer_shape(
        self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], torch.Tensor], scheme: Scheme
    ) -> tuple[int, int]:
        """From the shapes of the packed tensors; see :meth:`Format.layer_shape`."""
        return self._layout(scheme).size(shapes, read)

    def _layout(self, scheme: Scheme) -> Layout:
        return layout_of(scheme)

    @classmethod
    def packages(cls, runtime: str, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """The package, whose releases from 0.18 on fail on the zero points of asymmetric layers, as seen up to 0.20."""
        if runtime == "transformers" and not all(scheme.symmetric for scheme in schemes):
            return ("compressed-tensors<0.18",)
        return super().packages(runtime, schemes)

    @classmethod
    def computes_in(cls, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """4-bit floats are decoded to bfloat16 whatever the model computes in."""
        return ("bfloat16",) if _has_four_bit_floats(schemes) else super().computes_in(schemes)

    def pack(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The tensors of the scheme's sub-format, and the static scale of inputs, float32 ``[1]``."""
        layout = self._layout(weight.scheme)
        scale = {} if layout.input_suffix is None else {layout.input_suffix: weight.parts[INPUT_SCALE]}
        return {**layout.pack(weight), **scale}

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of :meth:`pack`.

        Raises:
            CheckpointError: a static scale of inputs is no positive number.
        """
        found, scale = self._layout(scheme).unpack(tensors), self.input_scale(tensors.__getitem__, scheme)
        return found if scale is None else replace(found, parts={**found.parts, INPUT_SCALE: scale})

    def input_scale(self, read: Callable[[str], torch.Tensor], scheme: Scheme) -> torch.Tensor | None:
        """From the tensor that holds it.

        Raises:
            CheckpointError: it is no positive number.
        """
        suffix = self._layout(scheme).input_suffix
        return None if suffix is None else _scale_of_inputs(read(suffix))

    def packed_shapes(self, scheme: Scheme, out_features: int, in_features: int) -> PackedShapes:
        """As the scheme's sub-format has them."""
        layout = self._layout(scheme)
        scale: PackedShapes = {} if layout.input_suffix is None else {layout.input_suffix: ("float32", (1,))}
        return {**layout.packed_shapes(out_features, in_features, self.scale_dtype(self.dtype)), **scale}

    def layer_suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """The suffixes of :meth:`pack`."""
        return self._layout(scheme).all_suffixes

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

    @classmethod
    def cache_rounding(cls, config: Mapping[str, Any]) -> CacheRounding | None:
        """From ``kv_cache_scheme``, where it asks for what quantkit has."""
        asked = config.get("kv_cache_scheme")
        if not isinstance(asked, dict):
            return None
        return next((each for each in CACHES.values() if _asks_for(asked, _cache_args(each))), None)

    @classmethod
    def with_cache(cls, config: dict[str, Any], rounding: CacheRounding) -> dict[str, Any]:
        """As ``kv_cache_scheme``; the scales lie in the file as ``k_scale`` and ``v_scale`` of each attention."""
        return {**config, "kv_cache_scheme": _cache_args(rounding)}

    @classmethod
    def turns_in(cls, config: Mapping[str, Any]) -> dict[str, int]:
        """From ``transform_config``."""
        from quantkit.formats._compressed_tensors.turning import turns_in

        return turns_in(config.get("transform_config"))

    @classmethod
    def with_turns(cls, config: dict[str, Any], turns: Mapping[str, int]) -> dict[str, Any]:
        """As ``transform_config``; no tensor of the file belongs to it."""
        from quantkit.formats._compressed_tensors.turning import transform_config

        return {**config, "transform_config": transform_config(turns)}

    def with_embedding(self, config: dict[str, Any], name: str, scheme: Scheme) -> dict[str, Any]:
        """A group of its own, with the full name of the embedding: a model may have others that stay float."""
        groups = dict(config["config_groups"])
        groups[f"group_{len(groups)}"] = _config_group(embedding_layout_of(scheme), [name])
        return {**config, "format": _common_format(groups), "config_groups": groups}

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """What does not load everywhere."""
        remarks = {
            ASYMMETRIC: not all(scheme.symmetric for scheme in schemes),
            OTHER_BITS: any(isinstance(each, IntScheme) and each.bits not in BITS_OF_VLLM for each in schemes),
            FOUR_BIT_FLOATS: _has_four_bit_floats(schemes),
            FP8_INPUTS: any(isinstance(each, IntScheme) and each.activations == "fp8" for each in schemes),
            INT8_INPUTS: any(_has_packed_int8_inputs(each) for each in schemes),
            FOUR_BIT_INPUTS: any(each.input_rounding and each.input_rounding.bits == 4 for each in schemes),
        }
        return tuple(remark for remark, holds in remarks.items() if holds)


def _scale_of_inputs(found: torch.Tensor) -> torch.Tensor:
    scale = found.float().reshape(-1)
    if scale.numel() != 1 or not bool(scale.isfinite().all() and scale.gt(0).all()):
        raise CheckpointError("the static scale of its inputs is no positive number", "get the checkpoint again")
    return scale


def _has_packed_int8_inputs(scheme: Scheme) -> bool:
    whole = (scheme.bits, scheme.group_size) == (8, PER_CHANNEL)
    return isinstance(scheme, IntScheme) and scheme.activations == "dynamic" and not whole


def _has_four_bit_floats(schemes: Collection[Scheme]) -> bool:
    return any(isinstance(scheme, Mxfp4Scheme | Nvfp4Scheme) for scheme in schemes)


class _Embeddings(CompressedTensors):
    """Packs and unpacks input embeddings."""

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """Who loads them."""
        return (EMBEDDING,) if schemes else ()

    def _layout(self, scheme: Scheme) -> Layout:
        return embedding_layout_of(scheme)


class _Described(CompressedTensors):
    """Unpacks a file of another tool by the groups of its config."""

    def __init__(self, config: Mapping[str, Any], dtype: str) -> None:
        from quantkit.formats._compressed_tensors.reading import groups_in

        super().__init__(dtype)
        self._groups: list[Group] = groups_in(config)
        self._leaves_cache = config.get("kv_cache_scheme") is not None and self.cache_rounding(config) is None

    def for_embeddings(self) -> Format:
        """The same: groups say how an embedding is stored."""
        return self

    def remarks(self, schemes: Collection[Scheme]) -> tuple[str, ...]:
        """Also what the groups ask of a runtime beyond the schemes."""
        notes = [note for group in self._groups if group.scheme in schemes for note in group.notes]
        return tuple(dict.fromkeys([*super().remarks(schemes), *notes, *([KV_CACHE] if self._leaves_cache else [])]))

    def _layout(self, scheme: Scheme) -> Layout:
        return next(group.layout for group in self._groups if group.scheme == scheme)


def _common_format(groups: Mapping[str, Mapping[str, Any]]) -> str:
    formats = {group["format"] for group in groups.values()}
    return formats.pop() if len(formats) == 1 else MIXED


def _cache_args(rounding: CacheRounding) -> dict[str, Any]:
    kind, strategy = "float" if rounding.numbers == "fp8" else "int", "attn_head" if rounding.per_head else "tensor"
    return quantization_args(kind, 8, strategy, observer=STATIC_OBSERVER)


def _asks_for(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    keys = ("num_bits", "type", "strategy", "symmetric", "dynamic")
    return all(given.get(key, wanted[key]) == wanted[key] for key in keys)


def _config_group(layout: Layout, targets: list[str]) -> dict[str, Any]:
    return {
        "targets": targets,
        "weights": layout.weight_args(),
        "input_activations": layout.input_args(),
        "output_activations": None,
        "format": layout.name,
    }


def _is_llm_compressor(folder: Path) -> bool:
    """Whether the recipe of llm-compressor lies beside the weights: stages of modifiers."""
    recipe = folder / "recipe.yaml"
    try:
        return recipe.is_file() and "_modifiers:" in recipe.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
