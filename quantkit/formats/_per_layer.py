"""What GPTQ and AWQ checkpoints of any author say of a layer: common settings, and rules that change some of them.

The rules are gptqmodel's ``dynamic``: regular expressions, matched from the start of a layer's name. One that begins
with ``-:`` keeps layers float, any other gives them settings of their own; ``+:`` before it means nothing more. Those
that keep layers float come first, then the first that matches holds.

vLLM reads them too and matches them to the names of the matrices that it fuses, so that one pattern names the layers of
such a matrix and the matrix itself. transformers does not read them; of ``modules_in_block_to_quantize``, which vLLM
reads too, it takes the ends of the names of layers that are packed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantkit.errors import CheckpointError
from quantkit.formats.base import EXPERT
from quantkit.schemes import PER_CHANNEL, IntScheme, Scheme

if TYPE_CHECKING:
    import torch

    from quantkit.checkpoint import CheckpointReader

BROKEN = "the checkpoint is broken or mixed up: get it again from its source"
FLOAT, OVERRIDE = "-:", "+:"
UNREAD = {
    "rotation": "rotates inputs while it runs",
    "activation": "quantizes inputs",
    "adapter": "adds an adapter to the weights",
}
"""Keys of gptqmodel's config whose meaning goes beyond packed weights."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a config says of one layer.

    Attributes:
        bits: width of a code.
        group_size: input columns that share a scale, or -1.
        symmetric: whether the zero point is the middle of the codes.
    """

    bits: int
    group_size: int
    symmetric: bool


class Rules:
    """The settings of each layer.

    Args:
        config: ``quantization_config`` of a checkpoint.

    Raises:
        CheckpointError: it lacks a setting, or has what quantkit does not read.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        for key, what in UNREAD.items():
            if config.get(key):
                raise CheckpointError(f"a checkpoint with '{key}' {what}, which quantkit does not read")
        if str(config.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
            raise CheckpointError(f"codes are packed into {config['pack_dtype']}, and quantkit reads int32")
        self._config = {
            "bits": config.get("bits", config.get("w_bit")),
            "group_size": config.get("group_size", config.get("q_group_size")),
            "sym": config.get("sym", True),
        }
        _settings(self._config)
        self._rules = _compiled(config.get("dynamic") or {})

    def of(self, layer: str) -> Settings:
        """The settings of a packed layer.

        Raises:
            CheckpointError: they make no sense, or the config says that the layer is not packed.
        """
        for pattern, changes in self._rules:
            if pattern.match(layer):
                if changes is None:
                    raise CheckpointError(f"layer {layer} is packed, and 'dynamic' keeps it float", BROKEN)
                return _settings(self._config | {key: changes[key] for key in self._config if key in changes})
        return _settings(self._config)


def _settings(config: Mapping[str, Any]) -> Settings:
    bits, size, symmetric = config["bits"], config["group_size"], config["sym"]
    if type(bits) is not int or type(size) is not int or type(symmetric) is not bool:
        raise CheckpointError(
            f"quantization_config has bits {bits!r}, group_size {size!r} and sym {symmetric!r}: "
            "two whole numbers and a flag are wanted",
            BROKEN,
        )
    if size < 1 and size != PER_CHANNEL:
        raise CheckpointError(f"quantization_config has group_size {size}", BROKEN)
    return Settings(bits, size, symmetric)


def _compiled(dynamic: Any) -> list[tuple[re.Pattern[str], Mapping[str, Any] | None]]:
    """Patterns with what they change, None where they keep layers float; these come first."""
    if not isinstance(dynamic, Mapping):
        raise CheckpointError("'dynamic' of quantization_config is not a mapping", BROKEN)
    rules: list[tuple[re.Pattern[str], Mapping[str, Any] | None]] = []
    for text, changes in dynamic.items():
        keeps = text.startswith(FLOAT) or changes is False
        if not keeps and not isinstance(changes, Mapping):
            raise CheckpointError(f"'{text}' in 'dynamic' of quantization_config is not a mapping", BROKEN)
        try:
            pattern = re.compile(text.removeprefix(FLOAT).removeprefix(OVERRIDE))
        except re.error as error:
            raise CheckpointError(f"'{text}' in 'dynamic' is no regular expression: {error}", BROKEN) from error
        rules.append((pattern, None if keeps else changes))
    return sorted(rules, key=lambda rule: rule[1] is not None)


def packed_layers(reader: CheckpointReader, suffixes: tuple[str, ...]) -> list[str]:
    """The layers that have a ``qweight``.

    Args:
        reader: the checkpoint.
        suffixes: of the tensors that each must have beside it.

    Raises:
        CheckpointError: there is none, or one lacks a tensor.
    """
    layers = [name.removesuffix(".qweight") for name in reader.names() if name.endswith(".qweight")]
    if not layers:
        raise CheckpointError(f"{reader.folder} has no packed layer: no tensor is called qweight", BROKEN)
    for layer in layers:
        for suffix in suffixes:
            if f"{layer}.{suffix}" not in reader:
                raise CheckpointError(f"layer {layer} in {reader.folder} has no tensor '{suffix}'", BROKEN)
    return layers


def columns_per_group(layer: str, group_size: int, in_features: int) -> int:
    """Input columns that share a scale.

    Raises:
        CheckpointError: ``group_size`` does not divide ``in_features``.
    """
    size = in_features if group_size == PER_CHANNEL else group_size
    if size < 1 or in_features % size:
        raise CheckpointError(
            f"layer {layer} has {in_features} input columns, which groups of {size} do not divide",
            "quantkit reads whole groups only",
        )
    return size


def require(reader: CheckpointReader, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Check a tensor by the header of its file.

    Raises:
        CheckpointError: it has another dtype, or another shape than its config and the tensors beside it ask for.
    """
    if reader.dtype(name) not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise CheckpointError(f"tensor {name} is {reader.dtype(name)}, not {wanted}".replace("torch.", ""), BROKEN)
    if reader.shape(name) != shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(reader.shape(name))}, and by its config and the tensors beside it it is "
            f"{list(shape)}",
            BROKEN,
        )


def require_matrix(reader: CheckpointReader, name: str) -> tuple[int, int]:
    """The shape of a tensor of two dimensions.

    Raises:
        CheckpointError: it has more or fewer, or is empty.
    """
    shape = reader.shape(name)
    if len(shape) != 2 or 0 in shape:
        raise CheckpointError(f"tensor {name} has shape {list(shape)} and is no matrix", "quantkit reads Linear layers")
    return shape[0], shape[1]


GROUPS_OF_VLLM = (PER_CHANNEL, 32, 64, 128)
"""Group sizes of gptq and awq for which vLLM has kernels."""
BITS_OF_VLLM = (4, 8)
"""Of the integers that every release of vLLM loads."""
MATRICES = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("q_a_proj", "kv_a_proj_with_mqa"): "fused_qkv_a_proj",
    ("in_proj_qkv", "in_proj_z"): "in_proj_qkvz",
    ("in_proj_b", "in_proj_a"): "in_proj_ba",
}
"""Layers that vLLM loads as one matrix, with its name: those of Llama, of DeepSeek and of Qwen3.5."""
FUSED = (*MATRICES, ("w1", "w3"))
"""All of them; the last are a gate and its projection by another name, whose matrix has its part of a stack's."""
PART, PART_OF_VLLM = "model.language_model.", "language_model.model."
"""How names of the language model begin in a model of several parts, and how they do in vLLM."""
IN_BLOCK = re.compile(r"\.\d+\.")
"""In the name of a layer that lies in a numbered block."""


def refused_by_vllm(form: str, schemes: Iterable[Scheme]) -> str | None:
    """Why vLLM has no kernels for gptq or awq layers with these schemes, a sentence; None where it has."""
    schemes = list(schemes)
    if any(isinstance(scheme, IntScheme) and scheme.bits not in BITS_OF_VLLM for scheme in schemes):
        return f"vLLM loads integers of 4 and 8 bits from {form} files, and this one has others."
    if any(scheme.group_size not in GROUPS_OF_VLLM for scheme in schemes):
        return f"vLLM loads {form} files with groups of 32, 64 and 128 or one scale per channel, and this has others."
    return None


def commonest(schemes: Iterable[IntScheme]) -> IntScheme:
    """The scheme of most layers; of equally many the first."""
    return Counter(schemes).most_common(1)[0][0]


def settings(scheme: IntScheme) -> dict[str, Any]:
    """A scheme in the words of the config."""
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": scheme.desc_act,
    }


def exceptions(layers: Mapping[str, IntScheme | None]) -> dict[str, Any]:
    """``dynamic`` and ``modules_in_block_to_quantize``, where layers of the blocks are not all alike."""
    packed = {name: scheme for name, scheme in layers.items() if scheme is not None}
    base = settings(commonest(packed.values()))
    kept = kept_float(layers)
    changed = {
        OVERRIDE + _pattern(name): {key: value for key, value in settings(scheme).items() if value != base[key]}
        for name, scheme in packed.items()
        if settings(scheme) != base
    }
    found: dict[str, Any] = {"dynamic": kept | changed} if kept or changed else {}
    return found | ({"modules_in_block_to_quantize": [list(packed)]} if kept else {})


def kept_float(layers: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """The part of ``dynamic`` that names the float layers of the blocks; those outside are float anyway."""
    return {FLOAT + _pattern(name): {} for name, scheme in layers.items() if scheme is None and IN_BLOCK.search(name)}


def holds_head(layers: Iterable[str]) -> bool:
    """Whether one of the layers lies outside of the blocks: a model's output head."""
    return any(not IN_BLOCK.search(name) for name in layers)


def _pattern(name: str) -> str:
    """Matches a layer, those that vLLM fuses with it, and the matrix or the stack of experts that they become."""
    expert = EXPERT.match(name)
    if expert:
        return f"^{_place(expert['stack'])}(?:\\..+)?$"
    parent, dot, leaf = name.rpartition(".")
    for leaves, matrix in MATRICES.items():
        if leaf in leaves:
            return f"^{_place(parent + dot)}(?:{'|'.join([*leaves, matrix])})$"
    return f"^{_place(name)}$"


def _place(name: str) -> str:
    """Matches a name, also as vLLM has it, which calls the language model of several parts the other way round."""
    rest = name.removeprefix(PART)
    return re.escape(name) if rest == name else f"(?:{re.escape(PART)}|{re.escape(PART_OF_VLLM)}){re.escape(rest)}"
