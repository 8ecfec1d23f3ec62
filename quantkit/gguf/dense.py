"""The dense architectures of GGUF files: a table, see :mod:`quantkit.gguf.architecture`.

What a graph computes is read off ``src/models`` of https://github.com/ggml-org/llama.cpp, what its keys mean off the
package ``conversion`` there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from quantkit.gguf.architecture import COUNTS, LAYER_NORM, RMS_NORM, WINDOW, Architecture, head_size
from quantkit.gguf.head import GGUFHead
from quantkit.gguf.layouts import NORM_PLUS_ONE, ROTATED, TRANSPOSED, Heads, Layout, kind_by_kind

Known = Mapping[str, Any]
GELU = "gelu_pytorch_tanh"
USUAL = COUNTS | {RMS_NORM: "rms_norm_eps"}
"""Keys of a model that is built as a llama is."""
SILU = {"hidden_act": "silu"}
FUSED = {"attn_qkv": Layout(kind_by_kind)}
BIASES = {"attention_bias": "blk.0.attn_q.bias"}
WITHOUT_KEY_HEADS = {key: name for key, name in COUNTS.items() if name != "num_key_value_heads"}
WITHOUT_FEED_FORWARD = {key: name for key, name in WITHOUT_KEY_HEADS.items() if name != "intermediate_size"}
GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
SEEING = ("rope.dimension_sections", "n_deepstack_layers")
CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def _gemma_scalar(largest: int) -> Callable[[Known], int]:
    """The divisor of attention: the head size, and in the largest model, known by its blocks, what a head has."""

    def scalar(known: Known) -> int:
        per_head: int = known["hidden_size"] // known["num_attention_heads"]
        size: int = known["head_dim"]
        return per_head if known["num_hidden_layers"] == largest else size

    return scalar


def _every_fourth_without(known: Known) -> list[int]:
    return [int((block + 1) % 4 != 0) for block in range(known["num_hidden_layers"])]


def _slides(head: GGUFHead) -> bool:
    return bool(head.metadata.get(f"{head.architecture}.{WINDOW}"))


def _sections(config: PreTrainedConfig) -> list[int]:
    """How frequencies are shared among time, height and width, of which text has one."""
    usual = [24, 20, 20] if config.model_type.startswith("qwen3") else [16, 24, 24]
    found: list[int] = config.rope_parameters.get("mrope_section") or usual
    return found


def _wider_than_a_head(config: PreTrainedConfig) -> str | None:
    sections = _sections(config)
    wide = 2 * sum(sections) > head_size(config)
    return f"rope sections {sections}, which are wider than a head," if wide else None


def _seeing(config: PreTrainedConfig) -> dict[str, Any]:
    """The sections of the rope, and the blocks that see."""
    blocks = getattr(getattr(config, "tower", None), "deepstack_visual_indexes", None)
    return {SEEING[0]: [*_sections(config), 0], **({SEEING[1]: len(blocks)} if blocks else {})}


def _falcon_heads(config: PreTrainedConfig) -> Heads:
    queries = config.num_attention_heads
    if config.new_decoder_architecture:
        return Heads(queries, config.num_kv_heads)
    return Heads(queries, 1 if config.multi_query else queries)


def _falcon_settled(config: PreTrainedConfig) -> dict[str, Any]:
    """How many heads of keys and norms there are, which other values decide."""
    norms = config.num_ln_in_parallel_attn or 2
    return {
        "num_kv_heads": _falcon_heads(config).keys,
        "multi_query": None if config.new_decoder_architecture else config.multi_query,
        "num_ln_in_parallel_attn": norms if config.new_decoder_architecture else None,
    }


def _falcon_read(head: GGUFHead, known: Known) -> dict[str, Any]:
    keys, two = known["num_kv_heads"], "blk.0.attn_norm_2.weight" in head.tensors
    new = two or keys not in (1, known["num_attention_heads"])
    norms = {"num_ln_in_parallel_attn": 2 if two else 1} if new else {}
    return {"new_decoder_architecture": new, "multi_query": keys == 1, **norms}


def _mpt_described(config: PreTrainedConfig) -> dict[str, Any]:
    attention = config.attn_config
    clip = {} if attention.clip_qkv is None else {"attention.clamp_kqv": float(attention.clip_qkv)}
    feed_forward = config.expansion_ratio * config.d_model
    return {
        "feed_forward_length": feed_forward,
        "attention.max_alibi_bias": float(attention.alibi_bias_max),
        **clip,
    }


def _mpt_read(head: GGUFHead, known: Known) -> dict[str, Any]:
    attention: dict[str, Any] = {"alibi": True, "alibi_bias_max": int(head.positive("attention.max_alibi_bias"))}
    if f"{head.architecture}.attention.clamp_kqv" in head.metadata:
        attention["clip_qkv"] = head.positive("attention.clamp_kqv")
    ratio = head.count("feed_forward_length") // known["d_model"]
    return {"attn_config": attention, "expansion_ratio": ratio}


def _mpt_settled(config: PreTrainedConfig) -> dict[str, Any]:
    attention = {key: getattr(config.attn_config, key) for key in ("alibi_bias_max", "clip_qkv", "qk_ln", "prefix_lm")}
    usual = (config.d_model / config.n_heads) ** -0.5
    scale = config.attn_config.softmax_scale
    return {"attn_config": attention | {"softmax_scale": None if scale in (None, usual) else scale}}


def _few_blocks(config: PreTrainedConfig) -> str | None:
    few = config.use_qk_norm and config.num_hidden_layers < 64
    return "norms of queries and keys in fewer than 64 blocks" if few else None


LLAMA_LIKE = (
    Architecture(
        name="llama",
        model_type="llama",
        also=("mistral",),
        keys=USUAL,
        implied=SILU,
        tells={**BIASES, "mlp_bias": "blk.0.ffn_up.bias"},
        scalings=("linear", "yarn", "llama3"),
        layouts=ROTATED,
    ),
    Architecture(name="qwen2", model_type="qwen2", keys=USUAL, implied=SILU),
    Architecture(name="qwen3", model_type="qwen3", keys=USUAL, implied=SILU | {"attention_bias": False}),
    Architecture(
        name="qwen2vl",
        model_type="qwen2",
        also=("qwen2_vl_text", "qwen2_5_vl_text"),
        borrowed=True,
        keys=USUAL,
        implied=SILU,
        describe=_seeing,
        refusal=_wider_than_a_head,
        inferred=SEEING,
    ),
    Architecture(
        name="qwen3vl",
        model_type="qwen3",
        also=("qwen3_vl_text",),
        borrowed=True,
        keys=USUAL,
        implied=SILU | {"attention_bias": False},
        describe=_seeing,
        refusal=_wider_than_a_head,
        inferred=SEEING,
    ),
    Architecture(
        name="smollm3",
        model_type="smollm3",
        keys=USUAL,
        implied=SILU | {"no_rope_layer_interval": 4, "no_rope_layers": _every_fourth_without, "mlp_bias": False},
        tells=BIASES,
        layouts=ROTATED,
    ),
    Architecture(
        name="arcee",
        model_type="arcee",
        keys=USUAL,
        implied={"hidden_act": "relu2", "mlp_bias": False},
        tells=BIASES,
        scalings=("linear", "yarn", "llama3"),
        layouts=ROTATED,
    ),
    Architecture(
        name="granite",
        model_type="granite",
        keys=USUAL | GRANITE,
        implied=SILU,
        tells={**BIASES, "mlp_bias": "blk.0.ffn_up.bias"},
        scalings=("linear", "yarn", "llama3"),
        layouts=ROTATED,
    ),
    Architecture(
        name="olmo",
        model_type="olmo",
        keys=COUNTS | {"attention.clamp_kqv": "clip_qkv"},
        absent={"clip_qkv": None},
        implied=SILU | {"attention_bias": False},
        layouts=ROTATED,
        describe=lambda config: {LAYER_NORM: 1e-5},
    ),
    Architecture(
        name="olmo2",
        model_type="olmo3",
        when=_slides,
        keys=USUAL | {WINDOW: "sliding_window"},
        implied=SILU | {"attention_bias": False},
        rope="by layer",
        pattern=4,
        needs_head=True,
    ),
    Architecture(
        name="olmo2",
        model_type="olmo2",
        keys=USUAL,
        implied=SILU | {"attention_bias": False},
        needs_head=True,
    ),
    Architecture(
        name="exaone4",
        model_type="exaone4",
        keys=USUAL | {WINDOW: "sliding_window"},
        absent={"sliding_window": None},
        implied=SILU,
        scalings=("linear", "yarn", "llama3"),
        pattern=4,
        refusal=lambda config: (
            "sliding windows but in 64 blocks" if config.sliding_window and config.num_hidden_layers != 64 else None
        ),
    ),
    Architecture(
        name="seed_oss",
        model_type="seed_oss",
        keys=USUAL,
        implied=SILU | {"attention_out_bias": False, "mlp_bias": False},
        tells=BIASES,
    ),
    Architecture(
        name="ernie4_5",
        model_type="ernie4_5",
        keys=USUAL,
        implied=SILU | {"use_bias": False},
    ),
    Architecture(
        name="hunyuan-dense",
        model_type="hunyuan_v1_dense",
        keys=USUAL,
        implied=SILU | {"attention_bias": False},
    ),
    Architecture(name="glm4", model_type="glm4", keys=USUAL, implied=SILU, tells=BIASES, partial=True),
    Architecture(
        name="chatglm",
        model_type="glm",
        keys=USUAL,
        implied=SILU,
        tells=BIASES,
        partial=True,
        needs_head=True,
    ),
    Architecture(
        name="phi3",
        model_type="phi3",
        keys=USUAL
        | {WINDOW: "sliding_window", "rope.scaling.original_context_length": "original_max_position_embeddings"},
        absent={"sliding_window": None, "original_max_position_embeddings": 4096},
        implied=SILU,
        partial=True,
        scalings=("linear", "longrope"),
        ignores_window=True,
    ),
)
"""With the norms of a llama."""
GEMMAS = (
    Architecture(
        name="gemma",
        model_type="gemma",
        keys=USUAL,
        implied={"hidden_act": GELU, "attention_bias": False, "tie_word_embeddings": True},
        layouts={"_norm": NORM_PLUS_ONE},
    ),
    Architecture(
        name="gemma2",
        model_type="gemma2",
        keys=USUAL | CAPS | {WINDOW: "sliding_window"},
        absent={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
        implied={
            "hidden_activation": GELU,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": _gemma_scalar(46),
        },
        pattern=2,
        layouts={"_norm": NORM_PLUS_ONE},
    ),
    Architecture(
        name="gemma3",
        model_type="gemma3_text",
        keys=USUAL | {WINDOW: "sliding_window", "final_logit_softcapping": "final_logit_softcapping"},
        absent={"final_logit_softcapping": None, "sliding_window": None},
        implied={
            "hidden_activation": GELU,
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "query_pre_attn_scalar": _gemma_scalar(62),
        },
        rope="by layer",
        pattern=6,
        layouts={"_norm": NORM_PLUS_ONE},
    ),
)
LAYER_NORMS = (
    Architecture(
        name="phi2",
        model_type="phi",
        keys=COUNTS | {LAYER_NORM: "layer_norm_eps"},
        implied={"hidden_act": "gelu_new", "qk_layernorm": False},
        partial=True,
        needs_head=True,
    ),
    Architecture(
        name="starcoder2",
        model_type="starcoder2",
        keys=COUNTS | {LAYER_NORM: "norm_epsilon"},
        implied={"hidden_act": GELU, "use_bias": True, "sliding_window": None},
        ignores_window=True,
    ),
    Architecture(
        name="starcoder",
        model_type="gpt_bigcode",
        keys=WITHOUT_FEED_FORWARD | {"feed_forward_length": "n_inner", LAYER_NORM: "layer_norm_epsilon"},
        implied={
            "activation_function": GELU,
            "multi_query": True,
            "scale_attn_weights": True,
            "add_cross_attention": False,
        },
        rope="none",
        settled=lambda config: {"n_inner": config.n_inner or 4 * config.n_embd},
        describe=lambda config: {"attention.head_count_kv": 1},
    ),
    Architecture(
        name="falcon",
        model_type="falcon",
        keys=WITHOUT_FEED_FORWARD
        | {
            "feed_forward_length": "ffn_hidden_size",
            "attention.head_count_kv": "num_kv_heads",
            LAYER_NORM: "layer_norm_epsilon",
        },
        implied={"activation": "gelu", "parallel_attn": True, "bias": False, "alibi": False},
        layouts=FUSED,
        heads=_falcon_heads,
        settled=_falcon_settled,
        infer=_falcon_read,
    ),
    Architecture(
        name="gpt2",
        model_type="gpt2",
        keys=WITHOUT_FEED_FORWARD | {"feed_forward_length": "n_inner", LAYER_NORM: "layer_norm_epsilon"},
        implied={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        rope="none",
        layouts=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), TRANSPOSED),
        settled=lambda config: {"n_inner": config.n_inner or 4 * config.n_embd},
    ),
    Architecture(
        name="bloom",
        model_type="bloom",
        keys={key: name for key, name in WITHOUT_FEED_FORWARD.items() if name != "max_position_embeddings"}
        | {LAYER_NORM: "layer_norm_epsilon"},
        implied={"apply_residual_connection_post_layernorm": False},
        rope="none",
        layouts=FUSED,
        describe=lambda config: {
            "context_length": getattr(config, "seq_length", 2048),
            "feed_forward_length": 4 * config.hidden_size,
        },
    ),
    Architecture(
        name="mpt",
        model_type="mpt",
        keys={
            "context_length": "max_seq_len",
            "embedding_length": "d_model",
            "block_count": "n_layers",
            "attention.head_count": "n_heads",
            LAYER_NORM: "layer_norm_epsilon",
        },
        implied={"no_bias": True},
        rope="none",
        describe=_mpt_described,
        infer=_mpt_read,
        inferred=("feed_forward_length", "attention.max_alibi_bias", "attention.clamp_kqv"),
        settled=_mpt_settled,
    ),
    Architecture(
        name="gptneox",
        model_type="gpt_neox",
        keys=WITHOUT_KEY_HEADS | {LAYER_NORM: "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
        implied={"hidden_act": "gelu", "attention_bias": True},
        partial=True,
        layouts=FUSED,
        needs_head=True,
    ),
    Architecture(
        name="nemotron",
        model_type="nemotron",
        keys=COUNTS | {LAYER_NORM: "norm_eps"},
        implied={"hidden_act": "relu2"},
        tells={**BIASES, "mlp_bias": "blk.0.ffn_up.bias"},
        partial=True,
        layouts={"_norm": NORM_PLUS_ONE},
        needs_head=True,
    ),
    Architecture(
        name="stablelm",
        model_type="stablelm",
        keys=COUNTS | {LAYER_NORM: "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
        implied=SILU,
        tells={"use_qkv_bias": "blk.0.attn_q.bias", "qk_layernorm": "blk.0.attn_q_norm.weight"},
        renamed={"layernorm.norms": "layernorm"},
        partial=True,
        needs_head=True,
    ),
    Architecture(
        name="command-r",
        model_type="cohere",
        keys=COUNTS | {LAYER_NORM: "layer_norm_eps", "logit_scale": "logit_scale"},
        implied=SILU | {"attention_bias": False, "tie_word_embeddings": True},
        tells={"use_qk_norm": "blk.0.attn_q_norm.weight"},
        refusal=_few_blocks,
    ),
    Architecture(
        name="cohere2",
        model_type="cohere2",
        keys=COUNTS | {LAYER_NORM: "layer_norm_eps", "logit_scale": "logit_scale", WINDOW: "sliding_window"},
        implied=SILU | {"attention_bias": False, "tie_word_embeddings": True},
        pattern=4,
    ),
)
"""With norms that subtract the mean."""
DENSE = (*LLAMA_LIKE, *GEMMAS, *LAYER_NORMS)
