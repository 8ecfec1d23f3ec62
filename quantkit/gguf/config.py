"""From a GGUF file's metadata to the ``config.json`` that transformers reads.

All that decides the computation is taken from the file and nothing from transformers' defaults; what the
config could not say is refused, so that the dequantized model computes what the file's own runtime computes.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from quantkit.errors import SourceError, did_you_mean
from quantkit.gguf.head import GIVE_FLOAT, GGUFHead
from quantkit.gguf.tensors_in import dequantized

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
REFUSED = ("expert_count", "attention.sliding_window", "attention.scale", "attention.clamp_kqv", "logit_scale")


def model_config(head: GGUFHead, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of the model in a GGUF file, once its weights are stored in ``dtype``.

    Raises:
        SourceError: the architecture is not one of ``ARCHITECTURES``, a key is missing, or the model computes
            something that the config cannot say.
    """
    architecture = _architecture(head)
    _refuse_what_cannot_be_said(head, architecture)
    heads, hidden = _count(head, "attention.head_count"), _count(head, "embedding_length")
    head_dim = _count(head, "attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _count(head, key, head_dim) != head_dim:
            raise SourceError(f"{head.path}: {architecture}.{key} differs from the head size {head_dim}", GIVE_FLOAT)
    config = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": _vocabulary(head),
        "hidden_size": hidden,
        "intermediate_size": _count(head, "feed_forward_length"),
        "num_hidden_layers": _blocks(head),
        "num_attention_heads": heads,
        "num_key_value_heads": _count(head, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _count(head, "context_length"),
        "rms_norm_eps": _positive(head, "attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(head, head_dim),
        "tie_word_embeddings": "output.weight" not in head.tensors,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **special_ids(head),
    }
    if architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in head.tensors
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in head.tensors
    return config


def generation_config(head: GGUFHead) -> dict[str, Any]:
    """``generation_config.json``: the special tokens, with every token that ends a turn."""
    ids = special_ids(head)
    ends = [ids["eos_token_id"], head.metadata.get("tokenizer.ggml.eot_token_id")]
    distinct = [end for end in dict.fromkeys(ends) if end is not None]
    ids["eos_token_id"] = distinct if len(distinct) > 1 else ids["eos_token_id"]
    return {key: value for key, value in ids.items() if value is not None}


def special_ids(head: GGUFHead) -> dict[str, Any]:
    """The ids of the special tokens, None for those that the file does not name.

    Raises:
        SourceError: an id is not one of the vocabulary.
    """
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {name: head.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    rows = _vocabulary(head)
    for name, number in ids.items():
        if number is not None and not (isinstance(number, int) and 0 <= number < rows):
            raise SourceError(f"{head.path}: {name} {number!r} is not in the vocabulary of {rows}", GIVE_FLOAT)
    return ids


def _architecture(head: GGUFHead) -> str:
    architecture = str(head.metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise SourceError(
            f"{head.path} has the architecture '{architecture}', which quantkit cannot convert from GGUF",
            f"{did_you_mean(architecture, ARCHITECTURES)}; or {GIVE_FLOAT}",
        )
    return architecture


def _refuse_what_cannot_be_said(head: GGUFHead, architecture: str) -> None:
    parts = head.metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise SourceError(f"{head.path} is one of {parts} parts", "join them first: llama-gguf-split --merge")
    for key in REFUSED:
        if head.metadata.get(f"{architecture}.{key}"):
            raise SourceError(f"{head.path} sets {architecture}.{key}, which quantkit cannot convert", GIVE_FLOAT)


def _rope(head: GGUFHead, head_dim: int) -> dict[str, Any]:
    theta = _positive(head, "rope.freq_base", 10000.0)
    prefix = f"{head.metadata['general.architecture']}.rope.scaling"
    scaling = head.metadata.get(f"{prefix}.type", "none")
    if ROPE_FACTORS in head.tensors and scaling == "none":
        return _llama3_rope(head, theta, head_dim)
    if scaling == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": _positive(head, "rope.scaling.factor")}
    if scaling != "none":
        raise SourceError(f"{head.path}: {prefix}.type is '{scaling}', which quantkit cannot convert", GIVE_FLOAT)
    return {"rope_type": "default", "rope_theta": theta}


def _llama3_rope(head: GGUFHead, theta: float, head_dim: int) -> dict[str, Any]:
    """The rope of Llama 3.1 and later, whose GGUF files hold one divisor per frequency and not its parameters.

    The parameters are those of Llama 3.1 with the largest divisor as the factor; they must give the file's
    divisors back.
    """
    divisors = dequantized(head, ROPE_FACTORS, torch.float32).flatten()
    factor = float(divisors.max())
    low, high, context = LLAMA3_ROPE.values()
    turns = context * theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim) / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors.double(), expected, rtol=1e-4):
        raise SourceError(f"{head.path}: {ROPE_FACTORS} is not the rope scaling of Llama 3", GIVE_FLOAT)
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3_ROPE}


def _blocks(head: GGUFHead) -> int:
    claimed = _count(head, "block_count")
    found = {match[1] for name in head.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if found != {str(number) for number in range(len(found))} or len(found) != claimed:
        raise SourceError(f"{head.path} claims {claimed} blocks and holds {len(found)}", "download the file again")
    return claimed


def _vocabulary(head: GGUFHead) -> int:
    embedding = head.tensors.get("token_embd.weight")
    if embedding is None:
        raise SourceError(f"{head.path} has no tensor 'token_embd.weight'", "is this a language model?")
    return embedding.shape[0]


def _count(head: GGUFHead, key: str, default: int | None = None) -> int:
    value = head.metadata.get(f"{head.metadata['general.architecture']}.{key}", default)
    if type(value) is not int or value < 1:
        raise SourceError(f"{head.path}: the metadata key '{key}' is {value!r}, not a count", GIVE_FLOAT)
    return value


def _positive(head: GGUFHead, key: str, default: float | None = None) -> float:
    value = head.metadata.get(f"{head.metadata['general.architecture']}.{key}", default)
    if type(value) is not float or not 0 < value < math.inf:
        raise SourceError(f"{head.path}: the metadata key '{key}' is {value!r}, not a positive number", GIVE_FLOAT)
    return value
