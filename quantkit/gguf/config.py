"""The metadata of a GGUF file and the ``config.json`` of transformers: each told from the other.

All that decides the computation is told, and nothing left to defaults; what the other side could not say is refused, so
that both compute the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from quantkit.errors import SourceError, did_you_mean
from quantkit.gguf.head import GIVE_FLOAT, OTHER_FORMAT, GGUFHead
from quantkit.gguf.rope import rope_metadata, rope_parameters
from quantkit.gguf.vocabulary import embedding_rows, special_ids

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""By the architecture, which transformers calls its model type, the model's class."""
WRITTEN_AS = {"mistral": "llama", **{name: name for name in ARCHITECTURES}}
"""By transformers' model type, what GGUF files call the architecture."""
HEADS, KEY_HEADS = "attention.head_count", "attention.head_count_kv"
COUNTS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    HEADS: "num_attention_heads",
    KEY_HEADS: "num_key_value_heads",
}
"""Keys of the metadata, and what a config calls them."""
HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
"""Keys that all hold the size of a head."""
NORM = "attention.layer_norm_rms_epsilon"
REFUSED = ("expert_count", "attention.sliding_window", "attention.scale", "attention.clamp_kqv", "logit_scale")
"""Keys of computations that a config cannot say."""


def model_config(head: GGUFHead, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of the model in a GGUF file, once its weights are stored in ``dtype``.

    Raises:
        SourceError: the architecture is not one of ``ARCHITECTURES``, a key is missing, or the model computes
            something that the config cannot say.
    """
    _refuse_what_a_config_cannot_say(head)
    counts = {name: head.count(key, _default(head, key)) for key, name in COUNTS.items()}
    _check_blocks(head, counts["num_hidden_layers"])
    config = {
        "architectures": [ARCHITECTURES[head.architecture]],
        "model_type": head.architecture,
        "vocab_size": embedding_rows(head),
        **counts,
        "head_dim": (head_dim := _head_dim(head, counts["hidden_size"] // counts["num_attention_heads"])),
        "hidden_act": "silu",
        "rms_norm_eps": head.positive(NORM),
        "rope_parameters": rope_parameters(head, head_dim),
        "tie_word_embeddings": "output.weight" not in head.tensors,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **special_ids(head),
    }
    if head.architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in head.tensors
    if head.architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in head.tensors
    return config


def generation_config(head: GGUFHead) -> dict[str, Any]:
    """``generation_config.json``: the special tokens, with every token that ends a turn."""
    ids = special_ids(head)
    ends = [ids["eos_token_id"], head.metadata.get("tokenizer.ggml.eot_token_id")]
    distinct = [end for end in dict.fromkeys(ends) if end is not None]
    ids["eos_token_id"] = distinct if len(distinct) > 1 else ids["eos_token_id"]
    return {key: value for key, value in ids.items() if value is not None}


def read_model_config(folder: Path) -> PreTrainedConfig:
    """The config of a model that a GGUF file can hold, with transformers' defaults filled in.

    Raises:
        SourceError: it cannot be read, or the model computes what a GGUF file cannot say.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder / 'config.json'} cannot be read: {error}", OTHER_FORMAT) from error
    if config.model_type not in WRITTEN_AS:
        raise SourceError(
            f"quantkit cannot write a model of type '{config.model_type}' as GGUF",
            f"{did_you_mean(config.model_type, WRITTEN_AS)}; or {OTHER_FORMAT}",
        )
    unlike = {
        f"hidden_act '{config.hidden_act}'": config.hidden_act != "silu",
        f"a sliding window of {getattr(config, 'sliding_window', None)} tokens": _slides(config),
        "biases of attention": config.model_type == "qwen3" and config.attention_bias,
        f"architectures {config.architectures}": _is_other_model(config),
    }
    for what, there in unlike.items():
        if there:
            raise SourceError(f"{folder}: a GGUF file of a {config.model_type} model cannot say {what}", OTHER_FORMAT)
    rope_metadata(config, folder)
    return config


def model_metadata(config: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """The keys of a model's shape and computation.

    Args:
        config: see :func:`read_model_config`.
        folder: of the model, for messages.

    Raises:
        SourceError: a rope that a GGUF file cannot say.
    """
    key_size, value_size, rotated = HEAD_SIZES
    shape = {
        "vocab_size": config.vocab_size,
        **{key: getattr(config, name) for key, name in COUNTS.items()},
        key_size: head_size(config),
        value_size: head_size(config),
        NORM: float(config.rms_norm_eps),
        rotated: head_size(config),
        **rope_metadata(config, folder),
    }
    return {f"{WRITTEN_AS[config.model_type]}.{key}": value for key, value in shape.items()}


def head_size(config: PreTrainedConfig) -> int:
    """Columns of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _refuse_what_a_config_cannot_say(head: GGUFHead) -> None:
    if head.architecture not in ARCHITECTURES:
        raise SourceError(
            f"{head.path} has the architecture '{head.architecture}', which quantkit cannot convert from GGUF",
            f"{did_you_mean(head.architecture, ARCHITECTURES)}; or {GIVE_FLOAT}",
        )
    parts = head.metadata.get("split.count", 0)
    if parts not in (0, 1):
        raise SourceError(f"{head.path} is one of {parts} parts", "join them first: llama-gguf-split --merge")
    for key in REFUSED:
        if head.metadata.get(f"{head.architecture}.{key}"):
            raise SourceError(f"{head.path} sets {head.architecture}.{key}, which quantkit cannot convert", GIVE_FLOAT)


def _default(head: GGUFHead, key: str) -> int | None:
    """What a file that lacks a count means by it: as many heads of keys as of queries."""
    return head.count(HEADS) if key == KEY_HEADS else None


def _check_blocks(head: GGUFHead, claimed: int) -> None:
    found = {match[1] for name in head.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if found != {str(number) for number in range(len(found))} or len(found) != claimed:
        raise SourceError(f"{head.path} claims {claimed} blocks and holds {len(found)}", "download the file again")


def _head_dim(head: GGUFHead, usual: int) -> int:
    head_dim = head.count(HEAD_SIZES[0], usual)
    for key in HEAD_SIZES[1:]:
        if head.count(key, head_dim) != head_dim:
            raise SourceError(
                f"{head.path}: {head.architecture}.{key} differs from the head size {head_dim}", GIVE_FLOAT
            )
    return head_dim


def _slides(config: PreTrainedConfig) -> bool:
    """Whether a token may not see all before it."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return False
    kinds = getattr(config, "layer_types", None)
    return kinds is None or "sliding_attention" in kinds


def _is_other_model(config: PreTrainedConfig) -> bool:
    """Whether the model has another head than one over the vocabulary."""
    return any(not name.endswith("ForCausalLM") for name in config.architectures or ())
