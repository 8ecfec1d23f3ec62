"""What a GPTQ checkpoint's config says of layers that are not like the others.

gptqmodel and vLLM read ``dynamic``, regular expressions matched from the start of a layer's name. vLLM matches them to
the names of the matrices that it fuses, so that one pattern names the layers of such a matrix and the matrix itself.
transformers does not read ``dynamic``; of ``modules_in_block_to_quantize``, which vLLM reads too, it takes the ends of
the names of layers that are packed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from quantkit.formats._per_layer import FLOAT, OVERRIDE
from quantkit.schemes import PER_CHANNEL, IntScheme, Scheme

GROUPS_OF_VLLM = (PER_CHANNEL, 32, 64, 128)
"""Group sizes of gptq and awq for which vLLM has kernels."""
FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}
"""Layers that vLLM loads as one matrix, with its name."""
IN_BLOCK = re.compile(r"\.\d+\.")
"""In the name of a layer that lies in a numbered block."""


def refused_by_vllm(form: str, schemes: Iterable[Scheme]) -> str | None:
    """Why vLLM has no kernels for gptq or awq layers with these schemes, a sentence; None where it has."""
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
    """Matches a layer, those that vLLM fuses with it, and the matrix that they become."""
    parent, dot, leaf = name.rpartition(".")
    for leaves, matrix in FUSED.items():
        if leaf in leaves:
            return f"^{re.escape(parent + dot)}(?:{'|'.join([*leaves, matrix])})$"
    return f"^{re.escape(name)}$"
