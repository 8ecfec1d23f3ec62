"""A small random model of every architecture of transformers that writes text, made from its config class.

A config class says which keys it has; those that name sizes get small values, whatever else it has stays as it is by
default. A few architectures need more, which :data:`FURTHER` has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from quantkit.checkpoint.model_class import build_model
from tests.tiny import VOCABULARY, tiny_tokenizer

MAPPINGS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
WIDTH, INNER, EXPERT, HEAD = 128, 256, 64, 32
LANGUAGE: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_dim", "emb_dim"), WIDTH),
    **dict.fromkeys(("word_embedding_dim", "lru_width", "attention_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp"), INNER),
    **dict.fromkeys(("dff", "d_inner", "dim_ff", "block_ff_dim"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), EXPERT),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), EXPERT),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "kv_channels", "dim_head", "d_head"), HEAD),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length"), 512),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"), HEAD),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), HEAD),
    "query_pre_attn_scalar": HEAD, "q_lora_rank": 64, "sliding_window": 64, "rotary_dim": 16,
    "num_nextn_predict_layers": 0,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "state_size": 16, "chunk_size": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    **dict.fromkeys(("image_token_id", "image_token_index"), 5), "video_token_id": 6, "audio_token_id": 7,
    "vision_start_token_id": 8, "vision_end_token_id": 9, "boi_token_index": 10, "eoi_token_index": 11,
}  # fmt: skip
"""Sizes of a language model, by the names that configs give them."""
TOWER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "projection_dim", "vision_output_dim"), 64),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim"), 64),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "num_attention_heads", "num_heads"), 2),
    **dict.fromkeys(("out_hidden_size", "output_dim"), WIDTH),
    "encoder_attention_heads": 2, "image_size": 32, "patch_size": 8, "head_dim": HEAD, "num_channels": 3,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1],
    "max_source_positions": 64,
}  # fmt: skip
"""Sizes of a tower of images or sounds."""
SEES = ("vision", "vit", "audio", "speech", "encoder", "image")
"""Words in the keys of a config under which the configs of towers lie."""
LARGEST = 50_000_000
"""Parameters of a model that is made at most."""
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": None}
FURTHER: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "axk1", "axk2", "glm4_moe_lite", "glm_moe_dsa",
                     "youtu", "mistral4", "mistral_large4_text", "glm5_next_text", "minicpm3", "dots3_note_text"),
                    LATENT),
    "longcat_flash": {"num_key_value_heads": 4, "zero_expert_num": 2, "num_layers": 2},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 32,
                         "mamba_d_state": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention"], "num_hidden_layers": 3, "mamba_num_heads": 8,
                   "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "zamba": {"num_hidden_layers": 6, "mamba_d_state": 16, "n_mamba_heads": 2, "attn_layer_period": 3,
              "attn_layer_offset": 2, "use_mamba_kernels": False, "head_dim": None, "attention_hidden_size": None},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
               "mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 8, "use_mamba_kernels": False,
               "num_key_value_heads": 4, "head_dim": None, "attention_hidden_size": None},
    "mamba2": {"num_heads": 8, "head_dim": 32, "n_groups": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 64,
                        "num_key_value_heads": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "minimax": {"layer_types": ["full_attention", "linear_attention"]},
    **{name: {"num_hidden_layers": 4} for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid")},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [INNER] * 4,
                     "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 32,
                     "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "llama4_text": {"intermediate_size": EXPERT, "num_experts_per_tok": 1},
    "falcon": {"head_dim": None, "num_key_value_heads": None},
    "mistral": {"sliding_window": None}, "mixtral": {"sliding_window": None}, "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4}, "dots1": {"num_key_value_heads": 4},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [EXPERT, 32]},
    "zaya": {"num_experts_per_tok": 1, "moe_router_topk": 1},
    **{name: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
       for name in ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "glm4v_text", "glm_ocr_text",
                    "paddleocr_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text")},
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3],
                                           "partial_rotary_factor": 0.5}},
    "qwen2_vl": {}, "pixtral": {"head_dim": 32},
}  # fmt: skip
"""What some architectures need beside; None takes a key away. Of a tower that is called as a model only its own."""


def architectures() -> Iterator[str]:
    """The names of all, in their order; those that read a text before they write one are left out."""
    for name in sorted({name for mapping in MAPPINGS for name in mapping}):
        if name in CONFIG_MAPPING and not _reads_first(CONFIG_MAPPING[name]):
            yield name


def _reads_first(kind: type[PreTrainedConfig]) -> bool:
    """Whether a model is of an encoder and a decoder, or an encoder that can be a decoder."""
    try:
        default = kind()
    except Exception:  # a config that is nothing without values is told of when it is made
        return False
    return bool(getattr(default, "is_encoder_decoder", False)) or getattr(default, "is_decoder", None) is False


def tiny_config(kind: type[PreTrainedConfig], sizes: dict[str, Any], further: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a small config of a class."""
    default = kind()
    alias: dict[str, str] = default.attribute_map or {}
    known = {*default.to_dict(), *alias}
    given = {key: value for key, value in (sizes | further).items() if key in known and value is not None}
    given = {key: value for key, value in given.items() if alias.get(key) not in given}
    given |= _rope(getattr(default, "rope_parameters", None))
    for key in known:
        inner = vars(default).get(key)
        if isinstance(inner, PreTrainedConfig) and key not in further:
            sees = any(word in key for word in SEES)
            own = FURTHER.get(inner.model_type, {})
            given[key] = tiny_config(type(inner), TOWER if sees else LANGUAGE, own) | {"model_type": inner.model_type}
    return given if "layer_types" in further else {key: each for key, each in given.items() if key != "layer_types"}


def _rope(default: Any) -> dict[str, Any]:
    """The rope of a head of :data:`HEAD` where it has sections for time, height and width."""
    if not isinstance(default, dict) or "mrope_section" not in default:
        return {}
    turned = round(HEAD // 2 * (default.get("partial_rotary_factor") or 1.0))
    return {"rope_parameters": default | {"mrope_section": [turned // 4, 3 * turned // 8, 3 * turned // 8]}}


def make(folder: Path, architecture: str) -> PreTrainedModel:
    """Write a small random model with a tokenizer."""
    torch.manual_seed(0)
    kind = CONFIG_MAPPING[architecture]
    config = kind(**tiny_config(kind, LANGUAGE, FURTHER.get(architecture, {})))
    with torch.device("meta"):
        parameters = build_model(config).num_parameters()
    if parameters > LARGEST:
        raise ValueError(f"its small model has {parameters:,} parameters")
    model: PreTrainedModel = build_model(config, dtype=torch.float32)
    embedding = model.get_input_embeddings()
    for name, parameter in model.named_parameters():
        if parameter is embedding.weight:
            torch.nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim >= 2 and not name.endswith(("A_log", "conv1d.weight")):
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim == 2 else 0.09)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.eval()
