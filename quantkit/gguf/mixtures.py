"""The mixtures of experts among the architectures of GGUF files: a table, see :mod:`quantkit.gguf.architecture`.

A file holds each projection of all experts of a block as one tensor, ``[experts, rows, columns]``, of one type. What a
graph computes is read off ``src/models`` of https://github.com/ggml-org/llama.cpp, what its keys mean off the package
``conversion`` there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gguf
from transformers import PreTrainedConfig

from quantkit.gguf.architecture import KEY_HEADS, WINDOW, Architecture
from quantkit.gguf.dense import BIASES, GRANITE, SILU, USUAL
from quantkit.gguf.head import GGUFHead
from quantkit.gguf.layouts import (
    ROTATED,
    Heads,
    Pieces,
    alternating,
    as_it_is,
    halves,
    keys_and_values,
    turned,
    turned_alternating,
)

Known = Mapping[str, Any]
EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
OWN_SIZE = {"expert_feed_forward_length": "moe_intermediate_size"}
ALL_ALIKE = {"decoder_sparse_step": 1, "mlp_only_layers": None, "sliding_window": None}
"""Every block has experts."""
SCORED = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "leading_dense_block_count": "first_k_dense_replace",
    **OWN_SIZE,
}
"""Keys of models that score experts as DeepSeek-V3 does."""
UNSCORED = {
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 0,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "first_k_dense_replace": 0,
}
"""What they mean where a file lacks them."""
GATING = "expert_gating_func"
SOFTMAX, SIGMOID = gguf.ExpertGatingFuncType.SOFTMAX, gguf.ExpertGatingFuncType.SIGMOID
CORRECTION = {"e_score_correction_bias": "e_score_correction.bias"}
GATE, UP, DOWN = (f"mlp.experts.{leaf}.weight" for leaf in ("gate_proj", "up_proj", "down_proj"))
FUSED_LEAVES = ("gate_proj", "up_proj")
OPENAI: dict[str, Pieces] = {
    "mlp.experts.gate_up_proj": turned_alternating(GATE, UP, leaves=FUSED_LEAVES),
    "mlp.experts.down_proj": turned(DOWN, leaves=("down_proj",)),
    "mlp.experts.gate_up_proj_bias": alternating("mlp.experts.gate_proj.bias", "mlp.experts.up_proj.bias"),
    "mlp.experts.down_proj_bias": as_it_is("mlp.experts.down_proj.bias"),
    "self_attn.sinks": as_it_is("self_attn.sinks.weight"),
}
JETMOE_LIKE: dict[str, Pieces] = {
    "block_sparse_moe.input_linear.weight": halves(GATE, UP, leaves=FUSED_LEAVES),
    "block_sparse_moe.output_linear.weight": as_it_is(DOWN, leaves=("down_proj",)),
    "shared_mlp.input_linear.weight": halves("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
    "shared_mlp.output_linear.weight": as_it_is("mlp.shared_expert.down_proj.weight"),
}
LATENT_PIECES = {
    "self_attn.kv_b_proj.weight": keys_and_values("self_attn.k_b_proj.weight", "self_attn.v_b_proj.weight")
}
KEY_SIZE, VALUE_SIZE = "attention.key_length", "attention.value_length"
MLA_KEY_SIZE, MLA_VALUE_SIZE = f"{KEY_SIZE}_mla", f"{VALUE_SIZE}_mla"
"""Sizes of a head; those of a model with compressed keys and values, which are computed with as they are."""


def _has_experts(head: GGUFHead) -> bool:
    return bool(head.metadata.get(f"{head.architecture}.expert_count"))


def _has(key: str) -> Callable[[GGUFHead], bool]:
    return lambda head: f"{head.architecture}.{key}" in head.metadata


def _scores_by(kind: gguf.ExpertGatingFuncType) -> Callable[[GGUFHead], bool]:
    return lambda head: head.metadata.get(f"{head.architecture}.{GATING}", SOFTMAX) == kind


def _fewer_key_heads(config: PreTrainedConfig) -> str | None:
    fewer = config.num_key_value_heads not in (None, config.num_attention_heads)
    return "fewer heads of keys than of queries" if fewer else None


def _unlike_v2(config: PreTrainedConfig) -> str | None:
    """The graph takes a model for one without compressed queries by its number of blocks."""
    if config.q_lora_rank is None and config.num_hidden_layers not in (26, 27):
        return "queries that are not compressed but in 26 or 27 blocks"
    return "groups of experts chosen by their best one" if (config.n_group or 1) > 1 else None


def _latent_heads(config: PreTrainedConfig) -> Heads:
    return Heads(config.num_attention_heads, config.num_attention_heads, config.qk_nope_head_dim)


def _latent_described(kind: gguf.ExpertGatingFuncType) -> Callable[[PreTrainedConfig], dict[str, Any]]:
    """The sizes of heads that share one compressed key and value."""

    def described(config: PreTrainedConfig) -> dict[str, Any]:
        rotated = config.qk_rope_head_dim
        return {
            KEY_HEADS: 1,
            KEY_SIZE: config.kv_lora_rank + rotated,
            VALUE_SIZE: config.kv_lora_rank,
            MLA_KEY_SIZE: config.qk_nope_head_dim + rotated,
            MLA_VALUE_SIZE: config.v_head_dim,
            "rope.dimension_count": rotated,
            GATING: int(kind),
        }

    return described


def _latent_read(head: GGUFHead, known: Known) -> dict[str, Any]:
    """The inverse, and of older files, which tell the sizes of heads as others do."""
    rotated = head.count("rope.dimension_count")
    return {
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": head.count(MLA_KEY_SIZE, head.count(KEY_SIZE)) - rotated,
        "v_head_dim": head.count(MLA_VALUE_SIZE, head.count(VALUE_SIZE)),
        "num_key_value_heads": known["num_attention_heads"],
    }


LATENT = {key: name for key, name in USUAL.items() if key != KEY_HEADS} | {
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
}
LATENT_ABSENT = {"q_lora_rank": None}
MIXTURES = (
    Architecture(
        name="llama",
        model_type="mixtral",
        when=_has_experts,
        keys=USUAL | EXPERTS,
        implied=SILU,
        layouts=ROTATED,
    ),
    Architecture(
        name="qwen2moe",
        model_type="qwen2_moe",
        keys=USUAL
        | OWN_SIZE
        | {
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        implied=SILU | ALL_ALIKE | {"norm_topk_prob": False, "qkv_bias": True},
        needs_head=True,
    ),
    Architecture(
        name="qwen3moe",
        model_type="qwen3_moe",
        keys=USUAL | OWN_SIZE | {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
        implied=SILU | ALL_ALIKE | {"norm_topk_prob": True, "attention_bias": False},
    ),
    Architecture(
        name="olmoe",
        model_type="olmoe",
        keys=USUAL | {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
        implied=SILU | {"norm_topk_prob": False, "attention_bias": False, "clip_qkv": None},
        needs_head=True,
        refusal=_fewer_key_heads,
    ),
    Architecture(
        name="gpt-oss",
        model_type="gpt_oss",
        keys=USUAL | EXPERTS | {"expert_feed_forward_length": "intermediate_size", WINDOW: "sliding_window"},
        implied=SILU | {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "attention_bias": True},
        scalings=("yarn",),
        untruncated=True,
        pattern=2,
        pieces=OPENAI,
        needs_head=True,
    ),
    Architecture(
        name="deepseek2",
        model_type="deepseek_v3",
        when=_scores_by(SIGMOID),
        keys=LATENT | SCORED,
        absent=UNSCORED | LATENT_ABSENT,
        implied=SILU | {"attention_bias": False, "rope_interleave": True},
        scalings=("yarn",),
        renamed=CORRECTION,
        pieces=LATENT_PIECES,
        latent=True,
        heads=_latent_heads,
        describe=_latent_described(SIGMOID),
        infer=_latent_read,
        inferred=(MLA_KEY_SIZE, MLA_VALUE_SIZE, GATING),
        refusal=lambda config: None if config.q_lora_rank else "queries that are not compressed",
    ),
    Architecture(
        name="deepseek2",
        model_type="deepseek_v2",
        keys=LATENT | SCORED,
        absent=UNSCORED | LATENT_ABSENT,
        implied=SILU | {"attention_bias": False, "mlp_bias": False, "topk_method": "greedy"},
        scalings=("yarn",),
        pieces=LATENT_PIECES,
        latent=True,
        heads=_latent_heads,
        describe=_latent_described(SOFTMAX),
        infer=_latent_read,
        inferred=(MLA_KEY_SIZE, MLA_VALUE_SIZE, GATING),
        refusal=_unlike_v2,
    ),
    Architecture(
        name="granitemoe",
        model_type="granitemoeshared",
        when=_has("expert_shared_feed_forward_length"),
        keys=USUAL | GRANITE | EXPERTS | {"expert_shared_feed_forward_length": "shared_intermediate_size"},
        implied=SILU,
        tells=BIASES,
        layouts=ROTATED,
        renamed={"block_sparse_moe.experts.": "mlp.experts."},
        pieces=JETMOE_LIKE,
    ),
    Architecture(
        name="granitemoe",
        model_type="granitemoe",
        keys=USUAL | GRANITE | EXPERTS,
        implied=SILU,
        tells=BIASES,
        layouts=ROTATED,
        renamed={"block_sparse_moe.experts.": "mlp.experts."},
        pieces=JETMOE_LIKE,
    ),
    Architecture(
        name="glm4moe",
        model_type="glm4_moe",
        keys=USUAL | SCORED,
        absent=UNSCORED,
        implied=SILU,
        tells={**BIASES, "use_qk_norm": "blk.0.attn_q_norm.weight"},
        partial=True,
        renamed=CORRECTION,
        describe=lambda config: {GATING: int(SIGMOID)},
        inferred=(GATING,),
    ),
    Architecture(
        name="minimax-m2",
        model_type="minimax_m2",
        keys=USUAL | EXPERTS | {"expert_feed_forward_length": "intermediate_size"},
        implied=SILU,
        partial=True,
        renamed=CORRECTION,
        needs_head=True,
        describe=lambda config: {GATING: int(SIGMOID)},
        inferred=(GATING,),
    ),
    Architecture(
        name="hunyuan-moe",
        model_type="hunyuan_v1_moe",
        keys=USUAL
        | {
            "expert_count": "num_experts",
            "expert_used_count": "moe_topk",
            "expert_feed_forward_length": "intermediate_size",
            "expert_shared_feed_forward_length": "intermediate_size",
        },
        implied=SILU | {"attention_bias": False},
        describe=lambda config: {"expert_shared_count": 1},
        inferred=("expert_shared_count",),
    ),
    Architecture(
        name="dots1",
        model_type="dots1",
        keys=USUAL | SCORED,
        absent=UNSCORED,
        implied=SILU | {"attention_bias": False, "sliding_window": None},
        renamed=CORRECTION,
        needs_head=True,
        describe=lambda config: {GATING: int(SIGMOID)},
        inferred=(GATING,),
        refusal=_fewer_key_heads,
    ),
)
"""Of those that share a name, the last one is meant where no other is."""
