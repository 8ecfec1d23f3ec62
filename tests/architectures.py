"""Tiny random models of many architectures, saved as ``save_pretrained`` saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from quantkit.checkpoint.model_class import build_model
from tests.tiny import VOCABULARY, tiny_tokenizer

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "qk_nope_head_dim": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip
DENSE: dict[str, dict[str, Any]] = {
    "gemma2": {**BASE, "sliding_window": 64},
    "gemma3_text": BASE,
    "phi": BASE,
    "phi3": BASE,
    "opt": {**BASE, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": VOCABULARY},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": VOCABULARY},
    "gpt2": {**GPT, "vocab_size": VOCABULARY},
    "gptj": {**GPT, "rotary_dim": 8, "vocab_size": VOCABULARY},
    "codegen": {**GPT, "rotary_dim": 8, "vocab_size": VOCABULARY},
    "falcon": {key: value for key, value in BASE.items() if key != "head_dim"},
    "olmo2": BASE,
    "cohere": BASE,
    "starcoder2": BASE,
    "glm4": BASE,
    "gpt_neox": {key: value for key, value in BASE.items() if key not in ("num_key_value_heads", "head_dim")},
    "lfm2": {**BASE, "layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {
        **BASE,
        "lru_width": 64,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 64,
        "num_attention_heads": 2,
        "head_dim": 32,
        "num_key_value_heads": 1,
    },
    "hrm_text": {**BASE, "num_key_value_heads": 4, "num_layers_per_stack": 2},
    "modernbert-decoder": {**BASE, "local_attention": 64},
    "zamba": {
        **BASE,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "use_mamba_kernels": False,
        "num_attention_heads": 4,
    },
    "zamba2": {
        **BASE,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "mamba_expand": 1,
        "use_mamba_kernels": False,
        "num_mem_blocks": 1,
        "adapter_rank": 32,
    },
}
"""Every block matrix of these is the weight of a layer."""
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**BASE, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**BASE, **EXPERTS},
    "olmoe": {**BASE, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**BASE, **DEEPSEEK},
    "glm4_moe": {**BASE, **DEEPSEEK, "q_lora_rank": None},
    "phimoe": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        **BASE, "intermediate_size": 32, "intermediate_size_mlp": 128, "num_local_experts": 4, "num_experts_per_tok": 2,
    },
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "vocab_size": VOCABULARY,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "jetmoe": {**BASE, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_5_moe_text": {
        **BASE, **EXPERTS, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip
"""Models whose experts transformers keeps in stacks, from files that hold them one by one or stacked."""
WRAPPED: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {**BASE, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": 5,
    },
    "gemma3": {"text_config": {**BASE, "sliding_window": 64}, "vision_config": VISION, "mm_tokens_per_image": 4},
}
"""Language models inside models that see, too."""
ODD: dict[str, dict[str, Any]] = {
    "cpmant": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "dim_head": 16,
        "dim_ff": 128,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
    },
    "longcat_flash": {
        **BASE, **DEEPSEEK, "num_layers": 2, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 128, "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "inkling_text": {
        **BASE, "n_routed_experts": 4, "n_shared_experts": 2, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 32,
    },
}  # fmt: skip
"""CPM-Ant puts tokens of its own before those that it is given, LongCat has experts that do nothing, Inkling a stack of
shared ones."""
ARCHITECTURES = DENSE | MIXTURES | WRAPPED
QWEN = {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
AUDIO = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_blocks": 6, "nemo_conv_channels": 16,
    "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16,
}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "phi4_multimodal": {
        **{key: value for key, value in BASE.items() if key != "head_dim"},
        "vision_config": {**VISION, "crop_size": 32},
        "audio_config": AUDIO,
    },
    "qwen2_audio": {
        "text_config": {**BASE, "model_type": "qwen2"},
        "audio_config": {
            "d_model": 32, "encoder_layers": 5, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
            "num_mel_bins": 16, "max_source_positions": 64, "model_type": "qwen2_audio_encoder",
        },
        "audio_token_index": 7,
    },
    "mllama": {
        "text_config": {**BASE, "num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "attention_heads": 2, "image_size": 32,
            "num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 64, "patch_size": 16,
            "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
        },
        "image_token_index": 5,
    },
    "idefics3": {
        "text_config": {**BASE, "model_type": "llama"}, "vision_config": VISION, "image_token_id": 5,
        "scale_factor": 2,
    },
    "qwen2_vl": {
        "text_config": QWEN, "vision_config": {
            "depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2,
        },
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 8, "vision_end_token_id": 9,
    },
    "qwen3_5": {
        "text_config": {
            **BASE, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        },
        "vision_config": {
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
            "num_position_embeddings": 16, "patch_size": 8,
        },
        "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 8, "vision_end_token_id": 9,
    },
}  # fmt: skip
"""Language models whose towers are not told from them by the number of their layers or by the auto class."""


def make(folder: Path, architecture: str, **changes: Any) -> PreTrainedModel:
    """Write a random model with its tokenizer; the model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **(ARCHITECTURES | ODD | TOWERS).get(architecture, {}) | changes)
    model: PreTrainedModel = build_model(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.eval()
