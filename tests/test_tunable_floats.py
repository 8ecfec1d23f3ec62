"""Which float parameters of a block can be tuned: those of norms, and biases of layers, each a tensor of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GptOssConfig

from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tunable_floats import tunable_floats
from tests.tiny import make_model, tiny_config

ATTENTION = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    ("family", "norms", "biases"),
    [
        ("llama", ["input_layernorm.weight", "post_attention_layernorm.weight"], []),
        (
            "qwen2",
            ["input_layernorm.weight", "post_attention_layernorm.weight"],
            [f"self_attn.{name}.bias" for name in ATTENTION],
        ),
        (
            "gpt_neox",
            [f"{name}_layernorm.{leaf}" for name in ("input", "post_attention") for leaf in ("weight", "bias")],
            [
                f"{name}.bias"
                for name in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
            ],
        ),
    ],
)
def test_norms_and_biases_are_told_from_the_rest(
    tmp_path: Path, family: str, norms: list[str], biases: list[str]
) -> None:
    skeleton = Skeleton(make_model(tmp_path / "model", family))
    segment = skeleton.segments[1]

    def found(*train: str) -> set[str]:
        return {name.removeprefix(f"{segment.prefix}.") for name in tunable_floats(skeleton, segment, train)}

    assert found("norms") == set(norms)
    assert found("biases") == set(biases)
    assert found("scales", "norms", "biases") == {*norms, *biases}
    assert found("scales", "zeros") == set()


def test_what_is_written_whole_is_left_out(tmp_path: Path) -> None:
    shape = {**tiny_config().to_dict(), "num_local_experts": 4, "num_experts_per_tok": 2}
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    config = GptOssConfig(**{key: shape[key] for key in (*keys, "num_local_experts", "num_experts_per_tok")})
    config.num_key_value_heads, config.head_dim = 2, 16
    config.architectures = ["GptOssForCausalLM"]
    config.save_pretrained(tmp_path)
    skeleton = Skeleton(tmp_path)
    segment = skeleton.segments[0]
    found = tunable_floats(skeleton, segment, ("norms", "biases"))
    assert any("expert" in layer.path and layer.module.bias is not None for layer in segment.layers), "a case at hand"
    assert not any("expert" in name for name in found)
    assert f"{segment.prefix}.self_attn.o_proj.bias" in found
