"""desc_act: groups that gather columns of like activation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.engine.ordering import quantize_in_order
from quantkit.errors import RecipeError
from quantkit.exports import open_export
from quantkit.methods import METHODS
from quantkit.methods.base import InputStatistics, Method
from quantkit.schemes import IntScheme
from tests.tiny import make_model

SCHEME = IntScheme(4, 16, symmetric=False, desc_act=True)
KEYS: dict[str, Any] = {"method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "format": "gptq"}


def gptq() -> Method:
    cls = METHODS.get("gptq")
    return cls(cls.Options())


def inputs(columns: int) -> torch.Tensor:
    """Calibration inputs, a few of whose channels are far stronger than the others."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return x * torch.where(torch.arange(columns) % 7 == 0, 20.0, 1.0)


def statistics(x: torch.Tensor) -> InputStatistics:
    gram = x.T @ x / len(x)
    return InputStatistics(len(x), x.abs().mean(0), gram.diagonal().clone(), gram)


def test_groups_go_down_the_order_of_the_inputs_strength() -> None:
    x, weight = inputs(64), torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    found = quantize_in_order(gptq())(weight, statistics(x), SCHEME, torch.float16).weight
    order = x.square().mean(0).argsort(descending=True, stable=True)
    assert found.parts["g_idx"][order].tolist() == [place // 16 for place in range(64)]
    assert found.scheme == SCHEME
    decoded = found.dequantize(torch.float32)
    by_hand = (found.codes.float() - found.zeros.float()[:, found.parts["g_idx"]]) * found.scales.float()[
        :, found.parts["g_idx"]
    ]
    assert torch.equal(decoded, by_hand)


def test_columns_that_already_lie_in_order_are_solved_as_ever() -> None:
    x = inputs(64)
    x = x[:, x.square().mean(0).argsort(descending=True)]
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    ordered = quantize_in_order(gptq())(weight, statistics(x), SCHEME, torch.float16)
    plain = gptq().quantize(weight, statistics(x), replace(SCHEME, desc_act=False), torch.float16)
    assert torch.equal(ordered.weight.codes, plain.weight.codes)
    assert torch.equal(ordered.weight.dequantize(torch.float32), plain.weight.dequantize(torch.float32))


def test_the_error_that_it_tells_is_that_of_the_weight_it_returns() -> None:
    x, weight = inputs(64), torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    solution = quantize_in_order(gptq())(weight, statistics(x), SCHEME, torch.float32)
    residual = (weight - solution.weight.dequantize(torch.float32)) @ x.T
    assert torch.allclose(solution.error, residual.square().mean(1), rtol=1e-3)


def test_rows_keep_the_groups_of_columns_even_where_the_layer_is_square() -> None:
    x, weight = inputs(64), torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    found = quantize_in_order(gptq())(weight, statistics(x), SCHEME, torch.float16).weight
    part = found.rows(8, 24)
    assert torch.equal(part.parts["g_idx"], found.parts["g_idx"])
    assert torch.equal(part.dequantize(torch.float32), found.dequantize(torch.float32)[8:24])


def test_a_checkpoint_in_the_gptq_format_holds_it(tmp_path: Path) -> None:
    model = make_model(tmp_path / "llama", dtype=torch.float16)
    out = quantkit.quantize(
        model, out=tmp_path / "out", calibration={"dataset": "instructions_mini", "samples": 4}, **KEYS
    )
    export = open_export(out)
    name = "model.layers.0.self_attn.{}"
    groups = [export.weight(name.format(leaf)).parts["g_idx"] for leaf in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(groups[0], groups[1])
    assert torch.equal(groups[0], groups[2])
    assert not torch.equal(groups[0], groups[0].sort().values)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "rtn", "range": "minmax"}, "method rtn asks for no calibration"),
        ({"format": "compressed-tensors"}, "no groups that gather columns"),
        ({"group_size": -1}, "desc_act orders the columns of groups"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantkit.quantize(tmp_path / "model", out=tmp_path / "out", **{**KEYS, **keys})
