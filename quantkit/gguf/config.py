"""The metadata of a GGUF file and the ``config.json`` of transformers: each told from the other.

All that decides the computation is told, and nothing left to defaults; what the other side could not say is refused, so
that both compute the same. Whether a file can say a config is found by doing it: the metadata that would be written is
read again, and every value that decides must have come back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from quantkit.errors import SourceError
from quantkit.gguf.architecture import (
    HEADS,
    KEY_HEADS,
    LAYER_NORM,
    PATTERN,
    RMS_NORM,
    WINDOW,
    Architecture,
    architecture_for,
    architecture_of,
    declared,
    head_size,
)
from quantkit.gguf.head import GIVE_FLOAT, OTHER_FORMAT, GGUFHead, GGUFTensor
from quantkit.gguf.rope import READ, ROTATED, rope_metadata, rope_parameters
from quantkit.gguf.vocabulary import embedding_rows, special_ids

FRACTIONS = {
    RMS_NORM, LAYER_NORM, "attention.scale", "embedding_scale", "residual_scale", "logit_scale", "attention.clamp_kqv",
    "attn_logit_softcapping", "final_logit_softcapping", "expert_weights_scale",
}  # fmt: skip
"""Keys whose values are no whole numbers."""
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
HEAD_SIZES = ("attention.key_length", "attention.value_length")
"""Keys that both hold the size of a head."""
FURTHER = "nextn_predict_layers"
"""How many of the blocks guess at further tokens, which the model's class does not have."""
SAYS_NOTHING = (
    FURTHER, "vocab_size", "tensor_data_layout", "attention.causal", "rope.scaling.finetuned", "feed_forward_length",
    "context_length", "rope.scaling.original_context_length", "use_parallel_residual",
    "rope.scaling.yarn_log_multiplier",
    KEY_HEADS, LAYER_NORM, RMS_NORM, *HEAD_SIZES, *READ,
)  # fmt: skip
"""Keys that are read elsewhere, or that decide nothing where an architecture does not read them."""
NO_MATTER = re.compile(
    r"dropout|pdrop|initializer|jitter_noise$|router_logits$|aux_loss_coef$|_token_ids?$|^summary_|softmax_in_fp32$"
    r"|^time_step_(min|max|scale|floor|init_scheme)$"
    r"|^(use_cache|pretraining_tp|is_decoder|vocab_size|rope_parameters|learned_pos_emb|init_device|norm_type"
    r"|slow_but_exact|reorder_and_upcast_attn|embedding_fraction|verbose|use_sliding_window|max_window_layers"
    r"|residual_in_fp32|rescale_prenorm_residual|use_mambapy|use_associative_scan"
    r"|sliding_window_pattern|num_mtp_layers|num_nextn_predict_layers)$"
)
"""Values of configs that decide nothing, or that another one tells."""
SAME_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "swish": "silu"}


def model_config(head: GGUFHead, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` of the model in a GGUF file, once its weights are stored in ``dtype``.

    Raises:
        SourceError: quantkit does not know the architecture, a key is missing, or the model computes something that
            the config cannot say.
    """
    architecture = architecture_of(head)
    _refuse_what_a_config_cannot_say(head, architecture)
    known = {architecture.key(name): _read(head, key, name, architecture) for key, name in architecture.keys.items()}
    blocks = architecture.key("num_hidden_layers")
    _check_blocks(head, known[blocks])
    known[blocks] -= head.metadata.get(f"{head.architecture}.{FURTHER}", 0)
    known["vocab_size"] = embedding_rows(head)
    rotates = architecture.rope != "none"
    usual = known["hidden_size"] // known["num_attention_heads"] if rotates else 0
    known |= {"head_dim": _head_dim(head, architecture, usual)} if rotates else {}
    known |= {flag: tensor in head.tensors for flag, tensor in architecture.tells.items()}
    known["tie_word_embeddings"] = OUTPUT not in head.tensors
    known |= {key: value(known) if callable(value) else value for key, value in architecture.implied.items()}
    known |= rope_parameters(head, architecture, known) | _windows(head, architecture, known)
    known |= architecture.infer(head, known)
    if rotates and known["head_dim"] == usual and "head_dim" not in declared(CONFIG_MAPPING[architecture.model_type]):
        del known["head_dim"]
    return {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        **known,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **special_ids(head),
    }


def generation_config(head: GGUFHead) -> dict[str, Any]:
    """``generation_config.json``: the special tokens, with every token that ends a turn."""
    ids = special_ids(head)
    ends = [ids["eos_token_id"], head.metadata.get("tokenizer.ggml.eot_token_id")]
    distinct = [end for end in dict.fromkeys(ends) if end is not None]
    ids["eos_token_id"] = distinct if len(distinct) > 1 else ids["eos_token_id"]
    return {key: value for key, value in ids.items() if value is not None}


def read_model_config(folder: Path) -> PreTrainedConfig:
    """The config of a language model that a GGUF file can hold, with transformers' defaults filled in.

    Of a model that sees or hears, too, it is that of its language model.

    Raises:
        SourceError: it cannot be read, or quantkit does not write such a model.
    """
    try:
        whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder / 'config.json'} cannot be read: {error}", OTHER_FORMAT) from error
    config: PreTrainedConfig = whole.get_text_config(decoder=True)
    architecture_for(config.model_type)
    if config is not whole:
        config.tower = getattr(whole, "vision_config", None)
        if not hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = whole.tie_word_embeddings
    for name in whole.architectures or ():
        if not name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            raise SourceError(f"{folder}: a GGUF file cannot say the architecture {name}", OTHER_FORMAT)
    return config


def check_config(config: PreTrainedConfig, tensors: Collection[str], folder: Path) -> None:
    """Check that a GGUF file says all of a config that decides.

    Args:
        config: see :func:`read_model_config`.
        tensors: that the file would hold.
        folder: of the model, for messages.

    Raises:
        SourceError: with what it cannot say.
    """
    architecture = architecture_for(config.model_type)
    metadata = model_metadata(config, folder) | {"general.architecture": architecture.name}
    refused = architecture.refusal(config)
    if architecture.needs_head and config.tie_word_embeddings:
        refused = "an output head that is the input embedding"
    if refused:
        raise SourceError(
            f"{folder}: llama.cpp does not compute {refused} of a {config.model_type} model", OTHER_FORMAT
        )
    stand_in = {name: _tensor(name, (1,)) for name in tensors}
    stand_in[EMBEDDING] = _tensor(EMBEDDING, (config.vocab_size, config.hidden_size))
    again = AutoConfig.for_model(**model_config(GGUFHead(folder, metadata, stand_in), torch.float32))
    wanted, found = deciding(config, architecture), deciding(again, architecture)
    for key, value in sorted(wanted.items(), key=lambda item: isinstance(item[1], list)):
        if not _same(value, found.get(key)):
            raise SourceError(
                f"{folder}: a GGUF file of a {config.model_type} model cannot say {key} {value!r}", OTHER_FORMAT
            )


def model_metadata(config: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """The keys of a model's shape and computation.

    Args:
        config: see :func:`read_model_config`.
        folder: of the model, for messages.

    Raises:
        SourceError: a rope that a GGUF file cannot say.
    """
    architecture = architecture_for(config.model_type)
    settled = _settled(config, architecture)
    values = {key: settled.get(name, getattr(config, name, None)) for key, name in architecture.keys.items()}
    size = {} if architecture.rope == "none" else dict.fromkeys(HEAD_SIZES, head_size(config))
    shape = {
        "vocab_size": config.vocab_size,
        **{key: float(value) if key in FRACTIONS else value for key, value in values.items() if value is not None},
        **size,
        **rope_metadata(config, architecture, folder),
        **architecture.describe(config),
    }
    usual = _pattern(architecture.pattern, config.num_hidden_layers)
    if architecture.pattern and slides(config) and list(config.layer_types) != usual:
        shape[PATTERN] = [kind == "sliding_attention" for kind in config.layer_types]
    return {f"{architecture.name}.{key}": value for key, value in shape.items()}


def deciding(config: PreTrainedConfig, architecture: Architecture) -> dict[str, Any]:
    """The values of a config that decide what is computed, those that are left open settled."""
    names = declared(type(config)) - declared(PreTrainedConfig)
    found = {name: getattr(config, name, None) for name in sorted(names) if not NO_MATTER.search(name)}
    found |= {name: SAME_ACTIVATIONS[str(value)] for name, value in found.items() if str(value) in SAME_ACTIVATIONS}
    if not slides(config) or architecture.ignores_window:
        seeing = {*(found.get("layer_types") or ())} <= {"full_attention", "sliding_attention"}
        found |= {name: None for name in ("sliding_window", *(["layer_types"] if seeing else ())) if name in found}
    return found | _settled(config, architecture)


def is_part(config: PreTrainedConfig) -> bool:
    """Whether :func:`read_model_config` found a language model that is a part of another model."""
    return hasattr(config, "tower")


def slides(config: PreTrainedConfig) -> bool:
    """Whether a token may not see all before it."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return False
    kinds = getattr(config, "layer_types", None)
    return kinds is None or "sliding_attention" in kinds


def _settled(config: PreTrainedConfig, architecture: Architecture) -> dict[str, Any]:
    known, found = declared(type(config)), architecture.settled(config)
    heads = {"num_key_value_heads": architecture.heads(config).keys} if "num_key_value_heads" in known else {}
    return heads | ({"head_dim": head_size(config)} if "head_dim" in known else {}) | found


def _same(value: Any, other: Any) -> bool:
    """Whether two values mean the same; what is off is written in several ways."""
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-6)
    return bool((value or None) == (other or None))


def _read(head: GGUFHead, key: str, name: str, architecture: Architecture) -> Any:
    """A value of the config from the metadata."""
    stored = head.metadata.get(f"{head.architecture}.{key}")
    if (key == WINDOW and stored == 0) or (stored is None and name in architecture.absent):
        return architecture.absent[name] if stored is None else None
    if isinstance(stored, bool) or (stored == 0 and architecture.absent.get(name) == 0):
        return stored
    if key in FRACTIONS:
        return head.positive(key)
    return head.count(key, head.count(HEADS) if key == KEY_HEADS else None)


def _windows(head: GGUFHead, architecture: Architecture, known: Mapping[str, Any]) -> dict[str, Any]:
    """Which blocks see a window, from a file."""
    blocks = known[architecture.key("num_hidden_layers")]
    if not architecture.pattern:
        return {}
    if known["sliding_window"] is None:
        return {"layer_types": ["full_attention"] * blocks}
    stated = head.metadata.get(f"{head.architecture}.{PATTERN}", architecture.pattern)
    if isinstance(stated, list) and len(stated) == blocks:
        return {"layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in stated]}
    if type(stated) is not int or stated < 1:
        raise SourceError(f"{head.path}: the metadata key '{PATTERN}' is {stated!r}, not a pattern", GIVE_FLOAT)
    return {"layer_types": _pattern(stated, blocks)}


def _pattern(length: int, blocks: int) -> list[str]:
    """Kinds of blocks of which every so many-th sees all tokens."""
    return ["sliding_attention" if length and (block + 1) % length else "full_attention" for block in range(blocks)]


def _refuse_what_a_config_cannot_say(head: GGUFHead, architecture: Architecture) -> None:
    known = {*architecture.keys, *architecture.inferred, *SAYS_NOTHING, *((PATTERN,) if architecture.pattern else ())}
    for key, value in head.metadata.items():
        name, _, rest = key.partition(".")
        if name == architecture.name and rest not in known and value not in (0, False, "none"):
            raise SourceError(f"{head.path} sets {key}, which quantkit cannot convert", GIVE_FLOAT)


def _check_blocks(head: GGUFHead, claimed: int) -> None:
    found = {match[1] for name in head.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if found != {str(number) for number in range(len(found))} or len(found) != claimed:
        raise SourceError(f"{head.path} claims {claimed} blocks and holds {len(found)}", "download the file again")


def _head_dim(head: GGUFHead, architecture: Architecture, usual: int) -> int:
    if architecture.latent:
        return head.count(ROTATED)
    head_dim = head.count(HEAD_SIZES[0], usual)
    for key in HEAD_SIZES[1:]:
        if head.count(key, head_dim) != head_dim:
            raise SourceError(
                f"{head.path}: {head.architecture}.{key} differs from the head size {head_dim}", GIVE_FLOAT
            )
    return head_dim


def _tensor(name: str, shape: tuple[int, ...]) -> GGUFTensor:
    return GGUFTensor(name, gguf.GGMLQuantizationType.F32, shape, 0, 0)
