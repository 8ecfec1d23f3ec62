"""The architectures of GGUF files with recurrent blocks: a table, see :mod:`quantkit.gguf.architecture`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from quantkit.gguf.architecture import COUNTS, HEADS, KEY_HEADS, RMS_NORM, Architecture
from quantkit.gguf.head import GGUFHead
from quantkit.gguf.layouts import DECAY, SQUEEZED, Heads

UNLIMITED = 1 << 20
"""The context that llama.cpp's converter writes for models without one."""


def _widened(config: PreTrainedConfig) -> int:
    """The width of an LFM2's MLP, which its config tells by a rule."""
    width: int = config.intermediate_size
    if not config.block_auto_adjust_ff_dim:
        return width
    width = int(2 * width / 3)
    if config.block_ffn_dim_multiplier is not None:
        width = int(config.block_ffn_dim_multiplier * width)
    multiple: int = config.block_multiple_of
    return multiple * -(-width // multiple)


def _lfm2_settled(config: PreTrainedConfig) -> dict[str, Any]:
    ruled = dict.fromkeys(("block_multiple_of", "block_ffn_dim_multiplier", "full_attn_idxs"))
    return {"intermediate_size": _widened(config), "block_auto_adjust_ff_dim": False, **ruled}


def _lfm2_described(config: PreTrainedConfig) -> dict[str, Any]:
    keys = config.num_key_value_heads
    return {KEY_HEADS: [keys if kind == "full_attention" else 0 for kind in config.layer_types]}


def _lfm2_read(head: GGUFHead, known: Mapping[str, Any]) -> dict[str, Any]:
    keys = head.counts(KEY_HEADS, known["num_hidden_layers"])
    kinds = ["full_attention" if each else "conv" for each in keys]
    return {"num_key_value_heads": max(keys), "layer_types": kinds}


RECURRENT = (
    Architecture(
        name="lfm2",
        model_type="lfm2",
        keys={key: name for key, name in COUNTS.items() if key != KEY_HEADS}
        | {RMS_NORM: "norm_eps", "shortconv.l_cache": "conv_L_cache"},
        implied={"conv_bias": False, "block_auto_adjust_ff_dim": False},
        layouts={"conv": SQUEEZED},
        describe=_lfm2_described,
        infer=_lfm2_read,
        inferred=(KEY_HEADS,),
        settled=_lfm2_settled,
    ),
    Architecture(
        name="mamba",
        model_type="mamba",
        keys={
            "embedding_length": "hidden_size",
            "block_count": "num_hidden_layers",
            "ssm.conv_kernel": "conv_kernel",
            "ssm.state_size": "state_size",
            "ssm.time_step_rank": "time_step_rank",
            RMS_NORM: "layer_norm_epsilon",
        },
        implied={"expand": 2, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu"},
        rope="none",
        layouts={"ssm_a": DECAY, "ssm_conv1d": SQUEEZED},
        describe=lambda config: {
            "context_length": UNLIMITED,
            "feed_forward_length": 0,
            HEADS: 0,
            "ssm.inner_size": config.expand * config.hidden_size,
        },
        inferred=("ssm.inner_size",),
        heads=lambda config: Heads(1, 1),
    ),
)
