"""The statistics are those of the tokens, whatever the batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.batches import Batch, make_batches
from quantkit.engine.precision import pass_dtype
from quantkit.engine.sensitivity import TokenWeights
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.statistics import Gatherer, add_gram, mirror_
from quantkit.engine.walk import Walk, WalkSettings
from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics, Method, MethodOptions, Solution, Statistic
from quantkit.schemes import Scheme
from tests.tiny import FAMILIES, make_model, tiny_method, tiny_rows, tiny_task

CPU = torch.device("cpu")


class Onlooker(Method):
    """Rounds to nearest, and keeps the statistics that it is given."""

    needs = frozenset(Statistic)

    def __init__(self) -> None:
        super().__init__(MethodOptions())
        self.seen: list[InputStatistics] = []

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        self.seen.append(statistics)
        return tiny_method("rtn").quantize(weight, statistics, scheme, scale_dtype)


def statistics_of(folder: Path, batches: list[Batch]) -> list[InputStatistics]:
    skeleton, onlooker = Skeleton(folder), Onlooker()
    task, _ = tiny_task(skeleton, onlooker, head=True)
    Walk(skeleton, CheckpointReader(folder), batches, [task], WalkSettings(CPU)).run()
    return onlooker.seen


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(tmp_path: Path, family: str) -> None:
    rows = tiny_rows(count=5, shortest=3, longest=40)
    narrow: dict[str, Any] = {"sliding_window": 8} if family == "mistral" else {}
    folder = make_model(tmp_path, family, tie_word_embeddings=True, **narrow)
    padded = make_batches(rows, CPU, may_pad=True)
    assert len(padded) == 1
    assert padded[0].valid is not None
    together = statistics_of(folder, padded)
    one_by_one = statistics_of(folder, [make_batches([row], CPU, may_pad=False)[0] for row in rows])
    assert {statistics.tokens for statistics in together} == {sum(map(len, rows))}
    assert len(together) == len(one_by_one)
    for found, expected in zip(together, one_by_one, strict=True):
        assert found.tokens == expected.tokens
        for name in ("gram", "abs_mean", "square_mean"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 2, 7, 64])
def test_statistics_are_exact(columns: int) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 50, columns, generator=draw)
    gatherer = Gatherer(frozenset(Statistic))
    for part in inputs:
        gatherer.add(part.view(5, 10, columns), Batch(torch.zeros(5, 10, dtype=torch.int64), None))
    found = gatherer.result()
    exact = inputs.double().reshape(-1, columns)
    assert found.tokens == 150
    assert found.gram is not None
    assert torch.equal(found.gram, found.gram.T)
    for value, expected in (
        (found.gram, exact.T @ exact / 150),
        (found.abs_mean, exact.abs().mean(0)),
        (found.square_mean, exact.square().mean(0)),
    ):
        assert value is not None
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", Statistic)
def test_only_what_is_asked_for_is_gathered(needs: Statistic) -> None:
    gatherer = Gatherer(frozenset({needs}))
    gatherer.add(torch.ones(4, 3), Batch(torch.zeros(1, 4, dtype=torch.int64), None))
    found = gatherer.result()
    given = {each: getattr(found, each.value) is not None for each in Statistic}
    assert given == {each: each is needs for each in Statistic}


def test_an_input_that_no_token_reached_has_no_statistics() -> None:
    assert Gatherer(frozenset(Statistic)).result() == InputStatistics()


def test_bfloat16_batches_are_summed_in_float32() -> None:
    # In bfloat16 a sum of ones ends at 256, where adding one changes nothing any more.
    total = torch.zeros(2, 2)
    for _ in range(1000):
        add_gram(total, torch.ones(1, 2, dtype=torch.bfloat16))
    assert total[0].tolist() == [1000, 1000]
    gatherer = Gatherer(frozenset({Statistic.ABS_MEAN}))
    gatherer.add(torch.ones(1000, 2, dtype=torch.bfloat16), Batch(torch.zeros(1, 1000, dtype=torch.int64), None))
    assert gatherer.result().abs_mean is not None
    exact = torch.randn(2048, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    total = torch.zeros(64, 64)
    add_gram(total, exact)
    expected = exact.double().T @ exact.double()
    assert ((total.double() - expected).triu().abs().max() / expected.diagonal().max()) < 2**-8


@pytest.mark.parametrize("columns", [64, 800])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_tokens_count_a_token_so_many_times(dtype: torch.dtype, columns: int) -> None:
    draw = torch.Generator().manual_seed(2)
    inputs = torch.randn(600, columns, generator=draw).to(dtype)
    counts = torch.randint(0, 4, (600,), generator=draw)
    ids = torch.zeros(2, 400, dtype=torch.int64)
    valid = torch.arange(800).view(2, 400)[:, :300].flatten()
    padded = torch.full((800, columns), 1e3, dtype=dtype)
    padded[valid] = inputs
    weights = TokenWeights(counts.float(), torch.tensor([0, 300]))
    weighed, repeated = Gatherer(frozenset(Statistic), "", weights), Gatherer(frozenset(Statistic))
    weighed.add(padded.view(2, 400, columns), Batch(ids, valid, (0, 1), lengths=(300, 300)))
    repeated.add(inputs.repeat_interleave(counts, 0).float(), Batch(torch.zeros(1, int(counts.sum())).long(), None))
    found, expected = weighed.result(), repeated.result()
    assert found.tokens == 600
    assert found.effective_tokens == round(float(counts.sum() ** 2 / counts.square().sum()))
    assert expected.effective_tokens == expected.tokens
    for name in ("gram", "abs_mean", "square_mean"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_weights_of_other_tokens_are_refused() -> None:
    gatherer = Gatherer(frozenset(Statistic), "expert", TokenWeights(torch.ones(5), torch.tensor([0])))
    with pytest.raises(QuantizationError, match=r"given 3 of a batch's 5 tokens"):
        gatherer.add(torch.ones(3, 4), Batch(torch.zeros(1, 5, dtype=torch.int64), None, (0,)))


def test_a_method_is_given_what_it_asks_for_and_shares_what_is_derived_with_its_like() -> None:
    known = InputStatistics(7, torch.ones(4), torch.ones(4), torch.eye(4))
    given = known.only(frozenset({Statistic.GRAM}))
    assert (given.tokens, given.abs_mean, given.square_mean) == (7, None, None)
    assert given.gram is known.gram
    given.derived["x"] = 1
    assert known.only(frozenset({Statistic.GRAM})).derived == {"x": 1}
    assert known.only(frozenset({Statistic.GRAM, Statistic.ABS_MEAN})).derived == {}
    assert known.only(frozenset()) == InputStatistics()


@pytest.mark.parametrize("columns", [1, 7, 256, 257, 1100])
def test_the_lower_triangle_mirrors_the_upper(columns: int) -> None:
    matrix = torch.randn(columns, columns)
    wanted = matrix.triu() + matrix.triu(1).T
    mirror_(matrix)
    assert torch.equal(matrix, wanted)


def test_a_torch_that_does_not_tell_of_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert pass_dtype(CPU, torch.bfloat16) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert pass_dtype(CPU, torch.bfloat16) == torch.float32


@pytest.mark.parametrize("backend", [SimpleNamespace(), SimpleNamespace(matmul=SimpleNamespace())])
def test_a_torch_without_a_setting_of_precision_multiplies_in_float32(
    monkeypatch: pytest.MonkeyPatch, backend: SimpleNamespace
) -> None:
    inputs = torch.randn(100, 24).bfloat16()
    monkeypatch.setattr(torch.backends, "mkldnn", backend)
    found = torch.zeros(24, 24)
    add_gram(found, inputs)
    torch.testing.assert_close(found, inputs.float().T @ inputs.float())
    assert not hasattr(getattr(backend, "matmul", None), "fp32_precision")
