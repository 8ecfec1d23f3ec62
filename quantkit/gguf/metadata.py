"""From the config of a transformers folder to the metadata of a GGUF file: the inverse of ``source.gguf_config``.

All that decides the computation is written; what the file could not say is refused, so that llama.cpp computes what
transformers does.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PreTrainedConfig

from quantkit.errors import SourceError, did_you_mean
from quantkit.gguf.config import LLAMA3_ROPE

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""By transformers' model type, what GGUF files call it."""
OTHER_FORMAT = "choose another format, such as compressed-tensors"


def read_model_config(folder: Path) -> PreTrainedConfig:
    """The config of a model that a GGUF file can hold, with transformers' defaults filled in.

    Raises:
        SourceError: it cannot be read, or the model computes what a GGUF file cannot say.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder / 'config.json'} cannot be read: {error}", OTHER_FORMAT) from error
    if config.model_type not in ARCHITECTURES:
        raise SourceError(
            f"quantkit cannot write a model of type '{config.model_type}' as GGUF",
            f"{did_you_mean(config.model_type, ARCHITECTURES)}; or {OTHER_FORMAT}",
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
    _rope(config, folder)
    return config


def model_metadata(config: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """The keys of a model's shape and computation.

    Args:
        config: see :func:`read_model_config`.
        folder: of the model, whose name and model card are read.

    Raises:
        SourceError: a rope that a GGUF file cannot say.
    """
    arch, head_dim = ARCHITECTURES[config.model_type], head_size(config)
    licence = _licence(folder)
    shape = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        **_rope(config, folder),
    }
    return {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": _name(folder),
        **({} if licence is None else {"general.license": licence}),
        **{f"{arch}.{key}": value for key, value in shape.items()},
    }


def head_size(config: PreTrainedConfig) -> int:
    """Columns of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_divisors(config: PreTrainedConfig) -> list[float] | None:
    """What each rotary frequency is divided by, for the rope of Llama 3.1 and later; None for others."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    low, high, context = LLAMA3_ROPE.values()
    found = []
    for place in range(0, head_size(config), 2):
        turns = context * rope["rope_theta"] ** -(place / head_size(config)) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return found


def _rope(config: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """The keys of the rotary embedding.

    Raises:
        SourceError: it is of a kind that quantkit does not write.
    """
    rope = dict(config.rope_parameters)
    kind = rope.pop("rope_type", "default")
    found = {"rope.freq_base": float(rope.pop("rope_theta"))}
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise SourceError(f"{folder}: quantkit does not write a partial rope as GGUF", OTHER_FORMAT)
    if kind == "linear":
        return found | {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "llama3" and all(rope.get(key) == value for key, value in LLAMA3_ROPE.items()):
        return found
    if kind != "default":
        raise SourceError(f"{folder}: quantkit does not write the rope scaling {rope | {'rope_type': kind}} as GGUF",
                          OTHER_FORMAT)  # fmt: skip
    return found


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


def _name(folder: Path) -> str:
    """The folder's name, of a snapshot in the hub's cache that of the model."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def _licence(folder: Path) -> str | None:
    """The licence that the model card states."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    opening, _, rest = text.partition("---\n")
    if opening or "\n---" not in rest:
        return None
    try:
        card = yaml.safe_load(rest[: rest.index("\n---")])
    except yaml.YAMLError:
        return None
    stated = card.get("license") if isinstance(card, dict) else None
    return stated if isinstance(stated, str) else None
