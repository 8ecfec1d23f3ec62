"""Tensor-parallel sizes: where heads and groups divide, and what stands in the way elsewhere."""

from __future__ import annotations

from typing import Any

from quantkit.inspection.parallel import split
from quantkit.schemes import Fp8Scheme, IntScheme

CONFIG: dict[str, Any] = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4}
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"


def layers(scheme: Any, inner: int = 5632) -> list[tuple[str, Any, tuple[int, int]]]:
    return [(UP, scheme, (inner, 2048)), (DOWN, scheme, (2048, inner)), ("o_proj", scheme, (2048, 2048))]


def test_groups_of_the_layers_that_write_the_residual_stream_decide() -> None:
    found = split(CONFIG, layers(IntScheme(4, 128)))  # 5632 is 44 groups
    assert found.sizes == (1, 2, 4)
    assert found.limits[8] == f"{DOWN} would have 704 inputs a device, in groups of 128"
    assert found.words().startswith("1, 2, 4 (8: ")
    assert split(CONFIG, layers(IntScheme(4, 32))).sizes == (1, 2, 4, 8, 16)
    assert split(CONFIG, layers(IntScheme(8, -1))).sizes == (1, 2, 4, 8, 16)


def test_heads_decide_too_and_those_of_keys_may_be_held_twice() -> None:
    assert split({**CONFIG, "num_attention_heads": 9}, []).sizes == (1,)
    assert split({**CONFIG, "num_key_value_heads": 2}, []).sizes == (1, 2, 4, 8, 16)
    assert split({**CONFIG, "num_key_value_heads": 6}, []).limits[4].startswith("6 heads of keys")
    assert split({"text_config": {**CONFIG, "num_attention_heads": 6}}, []).sizes == (1, 2)


def test_square_blocks_bind_outputs_as_well() -> None:
    found = split(CONFIG, layers(Fp8Scheme(granularity="block")))
    assert found.sizes == (1, 2, 4)
    assert "outputs a device, in blocks of 128" in found.limits[8]
