"""Products of float32 matrices by oneDNN: what MKL gives, rounded otherwise, where the processor is one that gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantkit.system import products
from quantkit.system.products import add_product_, fast_linears, multiplies_by_onednn, product
from tests.tiny import make_model


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN is taken whatever the processor; the shapes of inputs that it was given."""
    given: list[tuple[int, ...]] = []
    linear = products._linear

    def noted(inputs: torch.Tensor, *others: Any) -> torch.Tensor:
        given.append(tuple(inputs.shape))
        return linear(inputs, *others)

    monkeypatch.setattr(products, "multiplies_by_onednn", lambda: True)
    monkeypatch.setattr(products, "_linear", noted)
    return given


def _laid(values: torch.Tensor, how: str) -> torch.Tensor:
    """The same values otherwise in memory."""
    if how == "columns":
        return values.T.contiguous().T
    if how == "part":
        return torch.cat([values, values], 1)[:, : values.shape[1]]
    return values


@pytest.mark.parametrize("left", ["rows", "columns", "part"])
@pytest.mark.parametrize("right", ["rows", "columns", "part"])
@pytest.mark.parametrize("shape", [(32, 288, 96), (64, 512, 64), (2, 3, 5), (33, 1, 7)])
def test_both_libraries_give_the_same_to_float32(
    by_onednn: list[tuple[int, ...]], shape: tuple[int, int, int], left: str, right: str
) -> None:
    rows, inner, columns = shape
    one, other = _laid(torch.randn(rows, inner), left), _laid(torch.randn(inner, columns), right)
    found = product(one, other)
    torch.testing.assert_close(found, one @ other, rtol=1e-5, atol=1e-5 * inner**0.5)
    assert torch.equal(found, product(one, other))
    assert by_onednn == [(rows, inner)] * 2
    assert found.is_contiguous()


@pytest.mark.parametrize("fast", [False, True])
def test_a_product_is_added_to_a_matrix(
    by_onednn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    monkeypatch.setattr(products, "multiplies_by_onednn", lambda: fast)
    total, left, right = torch.randn(40, 24), torch.randn(64, 40), torch.randn(64, 24)
    wanted = total + left.T @ right
    add_product_(total, left.T, right)
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-5)
    assert len(by_onednn) == fast


@pytest.mark.skipif(not multiplies_by_onednn(), reason="MKL multiplies as fast here")
def test_a_row_or_a_column_is_the_same_beside_any_others(by_onednn: list[tuple[int, ...]]) -> None:
    left, right = torch.randn(96, 300), torch.randn(300, 640)
    whole = product(left, right)
    for rows, columns in ((2, 640), (31, 128), (96, 33), (64, 256)):
        assert torch.equal(product(left[:rows], right[:, :columns]), whole[:rows, :columns])
    assert len(by_onednn) == 5


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 0, 3), (1, 4, 3)])
def test_products_that_take_no_time_are_torch_s_own(
    by_onednn: list[tuple[int, ...]], shape: tuple[int, int, int]
) -> None:
    left, right = torch.randn(*shape[:2]), torch.randn(*shape[1:])
    assert torch.equal(product(left, right), left @ right)
    assert torch.equal(product(left.double(), right.double()), left.double() @ right.double())
    assert not by_onednn


def test_a_model_reads_many_tokens_by_onednn_and_says_the_same(
    tmp_path: Path, by_onednn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from quantkit.runtimes._model import TransformersModel

    model = TransformersModel(AutoModelForCausalLM.from_pretrained(make_model(tmp_path)).float().eval())
    ids = torch.arange(3, 19)
    fast = model.logits(ids)
    layers = sum(isinstance(each, nn.Linear) for each in model.model.modules())
    assert [shape[-2] for shape in by_onednn] == [16] * layers
    (together,) = model.logits_of([ids])
    assert torch.equal(together, fast)
    model.decode(ids, 2)
    assert len(by_onednn) == 2 * layers, "the speed that is measured is that of the model as it is"
    monkeypatch.setattr(products, "multiplies_by_onednn", lambda: False)
    torch.testing.assert_close(fast, model.logits(ids), rtol=1e-4, atol=1e-4)


def test_layers_of_other_kinds_are_left_alone(by_onednn: list[tuple[int, ...]]) -> None:
    layer, inputs = nn.Linear(24, 16), torch.randn(2, 9, 24)
    with fast_linears():
        assert layer(inputs).requires_grad
        with torch.no_grad():
            layer.bfloat16()(inputs.bfloat16())
            layer.float()(inputs[0, :4])
            assert not by_onednn
            found = layer(inputs)
    assert by_onednn == [(2, 9, 24)]
    torch.testing.assert_close(found, layer(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("maker", "bfloat16", "mkl", "wanted"),
    [
        ("AuthenticAMD", True, True, True),
        ("GenuineIntel", True, True, False),
        ("AuthenticAMD", False, True, False),
        ("AuthenticAMD", True, False, False),
    ],
)
def test_onednn_is_taken_where_mkl_leaves_half_of_the_processor_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: str, bfloat16: bool, mkl: bool, wanted: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    monkeypatch.setattr(products, "PROCESSOR_FILE", tmp_path / "cpuinfo")
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    products._is_amd.cache_clear()
    try:
        assert multiplies_by_onednn() is wanted
    finally:
        products._is_amd.cache_clear()
