"""Rotary embeddings in GGUF files and in transformers' configs: each told from the other.

Those of Llama 3.1 and later, and of Phi-3 with long contexts, are no keys of a file but tensors, with one divisor per
frequency.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from quantkit.errors import SourceError
from quantkit.gguf.architecture import Architecture, head_size
from quantkit.gguf.head import GIVE_FLOAT, OTHER_FORMAT, GGUFHead
from quantkit.gguf.tensors import dequantized

FACTORS = "rope_freqs.weight"
"""The tensor of the divisors."""
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""The tensors of the divisors for long contexts, and for short ones."""
ROPE_TENSORS = (FACTORS, LONG, SHORT)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The parameters of Llama 3.1, beside its factor."""
BASE, SLIDING_BASE, ROTATED = "rope.freq_base", "rope.freq_base_swa", "rope.dimension_count"
ATTENTION = "rope.scaling.attn_factor"
GEMMA3_SLIDING = 10000.0
"""The base of Gemma 3's blocks with a window, which its files leave out."""
FACTOR, ORIGINAL = "rope.scaling.factor", "rope.scaling.original_context_length"
FAST, SLOW = "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"
LOGARITHM = "rope.scaling.yarn_log_multiplier"
"""A tenth of what DeepSeek calls ``mscale_all_dim``."""
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
"""The parameters of yarn that files and configs leave out."""
READ = (
    BASE, SLIDING_BASE, ROTATED, ATTENTION, "rope.scaling.type", FACTOR, ORIGINAL, FAST, SLOW, LOGARITHM,
)  # fmt: skip
"""Keys that are read here."""


def rope_parameters(head: GGUFHead, architecture: Architecture, known: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of a config, from a file, alone in a dict; none where nothing is rotated.

    Args:
        head: of the file.
        architecture: of the file.
        known: values of the config, with the size of a head.

    Raises:
        SourceError: the rope is of a kind that quantkit does not convert.
    """
    if architecture.rope == "none":
        return {}
    whole = _parameters(head, architecture, known)
    rotated = head.count(ROTATED, known["head_dim"])
    if rotated != known["head_dim"] and not architecture.partial:
        raise SourceError(
            f"{head.path}: {head.architecture}.{ROTATED} differs from the head size {known['head_dim']}", GIVE_FLOAT
        )
    if architecture.partial:
        whole["partial_rotary_factor"] = rotated / known["head_dim"]
    if architecture.rope == "one":
        return {"rope_parameters": whole}
    usual = GEMMA3_SLIDING if architecture.model_type.startswith("gemma") else whole["rope_theta"]
    sliding = {"rope_type": "default", "rope_theta": head.positive(SLIDING_BASE, usual)}
    return {"rope_parameters": {"full_attention": whole, "sliding_attention": sliding}}


def rope_metadata(config: PreTrainedConfig, architecture: Architecture, folder: Path) -> dict[str, Any]:
    """The keys of a file, without the architecture before them, from a config.

    Raises:
        SourceError: the rope is of a kind that quantkit does not write.
    """
    if architecture.rope == "none":
        return {}
    rope = _whole_rope(config, architecture)
    kind, scaled, theta = rope.pop("rope_type", "default"), dict(rope), float(rope.pop("rope_theta"))
    partial = rope.pop("partial_rotary_factor", 1.0)
    if partial != 1.0 and not architecture.partial:
        raise SourceError(f"{folder}: quantkit does not write a partial rope as GGUF", OTHER_FORMAT)
    found: dict[str, Any] = {BASE: theta, ROTATED: int(head_size(config) * partial)}
    if architecture.rope == "by layer":
        found |= _sliding_metadata(config, architecture, theta, folder)
    known = kind == "default" or kind in architecture.scalings
    if not known or (kind == "llama3" and any(rope.get(key) != value for key, value in LLAMA3.items())):
        raise SourceError(
            f"{folder}: quantkit does not write the rope scaling {scaled | {'rope_type': kind}} as GGUF", OTHER_FORMAT
        )
    if kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "longrope":
        found[ATTENTION] = float(rope.get("attention_factor") or _long_attention(config))
    if kind == "yarn":
        found |= _yarn_metadata(rope, architecture, folder)
    return found


def rope_tensors(config: PreTrainedConfig, architecture: Architecture) -> dict[str, torch.Tensor]:
    """The tensors of the divisors, float32 ``[rotated / 2]``; none for a rope that has none."""
    rope = {} if architecture.rope == "none" else _whole_rope(config, architecture)
    match rope.get("rope_type"):
        case "llama3":
            divisors = {FACTORS: _divisors(rope["rope_theta"], rope["factor"], head_size(config))}
        case "longrope":
            divisors = {LONG: rope["long_factor"], SHORT: rope["short_factor"]}
        case _:
            divisors = {}
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in divisors.items()}


def _whole_rope(config: PreTrainedConfig, architecture: Architecture) -> dict[str, Any]:
    """The rope of blocks that see all tokens."""
    rope = config.rope_parameters
    return dict(rope["full_attention"] if architecture.rope == "by layer" else rope)


def _sliding_metadata(
    config: PreTrainedConfig, architecture: Architecture, theta: float, folder: Path
) -> dict[str, float]:
    rope = dict(config.rope_parameters["sliding_attention"])
    if rope["rope_type"] != "default":
        raise SourceError(f"{folder}: quantkit does not write the sliding rope {rope} as GGUF", OTHER_FORMAT)
    usual = GEMMA3_SLIDING if architecture.model_type.startswith("gemma") else theta
    return {} if rope["rope_theta"] == usual else {SLIDING_BASE: float(rope["rope_theta"])}


def _parameters(head: GGUFHead, architecture: Architecture, known: Mapping[str, Any]) -> dict[str, Any]:
    theta = head.positive(BASE, 10000.0)
    prefix = f"{head.architecture}.rope.scaling"
    scaling = head.metadata.get(f"{prefix}.type", "none")
    if FACTORS in head.tensors and scaling == "none":
        return _llama3_parameters(head, theta, known["head_dim"])
    if LONG in head.tensors and "longrope" in architecture.scalings:
        return _longrope_parameters(head, theta, known)
    if scaling == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": head.positive("rope.scaling.factor")}
    if scaling == "yarn" and "yarn" in architecture.scalings:
        return {"rope_type": "yarn", "rope_theta": theta, **_yarn_parameters(head, architecture)}
    if scaling != "none":
        raise SourceError(f"{head.path}: {prefix}.type is '{scaling}', which quantkit cannot convert", GIVE_FLOAT)
    return {"rope_type": "default", "rope_theta": theta}


def _yarn_metadata(rope: Mapping[str, Any], architecture: Architecture, folder: Path) -> dict[str, Any]:
    """Of yarn; llama.cpp multiplies queries and keys by what the factor asks for, times the attention factor."""
    own, whole = rope.get("mscale"), rope.get("mscale_all_dim")
    if own != whole or bool(whole) != architecture.latent or rope.get("truncate", True) == architecture.untruncated:
        raise SourceError(f"{folder}: quantkit does not write the rope scaling {dict(rope)} as GGUF", OTHER_FORMAT)
    factor, attention = float(rope["factor"]), rope.get("attention_factor")
    return {
        "rope.scaling.type": "yarn",
        FACTOR: factor,
        ORIGINAL: int(rope["original_max_position_embeddings"]),
        FAST: float(rope.get("beta_fast") or YARN["beta_fast"]),
        SLOW: float(rope.get("beta_slow") or YARN["beta_slow"]),
        **({ATTENTION: float(attention) / _yarn_attention(factor)} if attention else {}),
        **({LOGARITHM: 0.1 * float(whole)} if whole else {}),
    }


def _yarn_parameters(head: GGUFHead, architecture: Architecture) -> dict[str, Any]:
    factor, whole = head.positive(FACTOR), head.metadata.get(f"{head.architecture}.{LOGARITHM}")
    told = f"{head.architecture}.{ATTENTION}" in head.metadata
    scale = None if whole is None else round(float(whole) * 10, 6)
    return {
        "factor": factor,
        "original_max_position_embeddings": head.count(ORIGINAL, head.count("context_length")),
        "beta_fast": head.positive(FAST, YARN["beta_fast"]),
        "beta_slow": head.positive(SLOW, YARN["beta_slow"]),
        **({"attention_factor": head.positive(ATTENTION) * _yarn_attention(factor)} if told else {}),
        **({} if scale is None else {"mscale": scale, "mscale_all_dim": scale}),
        **({"truncate": False} if architecture.untruncated else {}),
    }


def _yarn_attention(factor: float) -> float:
    """What yarn multiplies queries and keys by where nothing else is told."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope_parameters(head: GGUFHead, theta: float, known: Mapping[str, Any]) -> dict[str, Any]:
    factors = {
        name: [float(str(each)) for each in dequantized(head, tensor, torch.float32).flatten().numpy()]
        for name, tensor in {"long_factor": LONG, "short_factor": SHORT}.items()
    }
    attention = (
        {"attention_factor": head.positive(ATTENTION)} if f"{head.architecture}.{ATTENTION}" in head.metadata else {}
    )
    original = {"original_max_position_embeddings": known["original_max_position_embeddings"]}
    return {"rope_type": "longrope", "rope_theta": theta, **factors, **original, **attention}


def _long_attention(config: PreTrainedConfig) -> float:
    """What longrope multiplies queries and keys by, where the config does not say."""
    original = config.original_max_position_embeddings
    longer = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0


def _llama3_parameters(head: GGUFHead, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters of Llama 3.1 with the largest divisor as the factor; they must give the file's divisors back."""
    found = dequantized(head, FACTORS, torch.float32).flatten()
    factor = float(found.max())
    expected = torch.tensor(_divisors(theta, factor, head_dim), dtype=torch.float64)
    if found.shape != expected.shape or not torch.allclose(found.double(), expected, rtol=1e-4):
        raise SourceError(f"{head.path}: {FACTORS} is not the rope scaling of Llama 3", GIVE_FLOAT)
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3}


def _divisors(theta: float, factor: float, head_dim: int) -> list[float]:
    """What each rotary frequency of Llama 3.1 is divided by."""
    low, high, context = LLAMA3.values()
    found = []
    for place in range(0, head_dim, 2):
        turns = context * theta ** -(place / head_dim) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found
