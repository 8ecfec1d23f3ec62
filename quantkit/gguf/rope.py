"""Rotary embeddings in GGUF files and in transformers' configs: each told from the other.

Those of Llama 3.1 and later are no keys of a file but a tensor, with one divisor per frequency.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from quantkit.errors import SourceError
from quantkit.gguf.head import GIVE_FLOAT, OTHER_FORMAT, GGUFHead
from quantkit.gguf.tensors import dequantized

FACTORS = "rope_freqs.weight"
"""The tensor of the divisors."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The parameters of Llama 3.1, beside its factor."""


def rope_parameters(head: GGUFHead, head_dim: int) -> dict[str, Any]:
    """``rope_parameters`` of a config, from a file.

    Raises:
        SourceError: the rope is of a kind that quantkit does not convert.
    """
    theta = head.positive("rope.freq_base", 10000.0)
    prefix = f"{head.architecture}.rope.scaling"
    scaling = head.metadata.get(f"{prefix}.type", "none")
    if FACTORS in head.tensors and scaling == "none":
        return _llama3_parameters(head, theta, head_dim)
    if scaling == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": head.positive("rope.scaling.factor")}
    if scaling != "none":
        raise SourceError(f"{head.path}: {prefix}.type is '{scaling}', which quantkit cannot convert", GIVE_FLOAT)
    return {"rope_type": "default", "rope_theta": theta}


def rope_metadata(config: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """The keys of a file, without the architecture before them, from a config.

    Raises:
        SourceError: the rope is of a kind that quantkit does not write.
    """
    rope = dict(config.rope_parameters)
    kind = rope.pop("rope_type", "default")
    found = {"rope.freq_base": float(rope.pop("rope_theta"))}
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise SourceError(f"{folder}: quantkit does not write a partial rope as GGUF", OTHER_FORMAT)
    if kind == "linear":
        return found | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "llama3" and all(rope.get(key) == value for key, value in LLAMA3.items()):
        return found
    if kind != "default":
        raise SourceError(f"{folder}: quantkit does not write the rope scaling {rope | {'rope_type': kind}} as GGUF",
                          OTHER_FORMAT)  # fmt: skip
    return found


def rope_divisors(config: PreTrainedConfig, head_dim: int) -> torch.Tensor | None:
    """The tensor of the divisors, float32 ``[head_dim / 2]``; None for a rope that has none."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    return torch.tensor(_divisors(rope["rope_theta"], rope["factor"], head_dim), dtype=torch.float32)


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
