"""K-quants and IQ4_NL whose codes quantkit chooses: exact blocks, less error than llama.cpp leaves, odd weights."""

from __future__ import annotations

import gguf
import pytest
import torch

from quantkit.errors import QuantizationError
from quantkit.exports.content import same_values
from quantkit.formats import FORMATS
from quantkit.gguf.kquants import decoded, encoded
from quantkit.llama_cpp.quantizer import quantize_rows
from quantkit.methods.base import InputStatistics, Solution
from quantkit.numerics.grid_search import codes_of, quantized
from quantkit.numerics.refine import Problem, descend, row_errors
from quantkit.schemes import GgmlScheme, QuantizedWeight, make_scheme
from quantkit.schemes.grids.ggml import KQuantGrids
from quantkit.schemes.grids.super_blocks import Steps
from tests.layers import random_weight
from tests.tiny import tiny_method

KINDS = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl"]
SUPER = KINDS[:-1]
COLUMNS = 512
TOKENS = 2000


def ggml(kind: str) -> GgmlScheme:
    scheme = make_scheme(kind, {})
    assert isinstance(scheme, GgmlScheme)
    return scheme


def grids_of(kind: str) -> KQuantGrids:
    found = ggml(kind).grids()
    assert isinstance(found, KQuantGrids)
    return found


@pytest.fixture(scope="module")
def gram() -> torch.Tensor:
    """Of correlated inputs of unlike strength."""
    draw = torch.Generator().manual_seed(7)
    mix = torch.randn(COLUMNS, COLUMNS, generator=draw) * torch.rand(COLUMNS, generator=draw)
    inputs = torch.randn(TOKENS, COLUMNS, generator=draw) @ mix
    return inputs.T @ inputs / TOKENS


def solved(
    weight: torch.Tensor, kind: str, gram: torch.Tensor | None, method: str = "gptq", **keys: object
) -> Solution:
    statistics = InputStatistics(TOKENS, gram=gram)
    return tiny_method(method, **keys).quantize(weight, statistics, ggml(kind), torch.float16)


def error(weight: torch.Tensor, found: torch.Tensor, gram: torch.Tensor) -> float:
    return float(row_errors((weight - found).T, gram).sum())


def assert_exact(weight: QuantizedWeight, kind: str) -> torch.Tensor:
    """The blocks of a weight, which decode to it bit for bit, here and in the package gguf."""
    scheme, store = ggml(kind), FORMATS.get("gguf")()
    packed = store.pack(store.fitted(weight))
    blocks = packed["weight"]
    assert blocks.dtype == torch.uint8
    assert blocks.shape == (weight.codes.shape[0], scheme.row_bytes(weight.codes.shape[1]))
    again = store.unpack(packed, scheme)
    assert same_values(again, weight)
    assert torch.equal(again.dequantize(), weight.dequantize())
    theirs = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[scheme.ggml_type]))
    if scheme.minima:
        largest = theirs.abs().view(len(theirs), -1, scheme.group_size).amax(-1)
        assert ((theirs - again.dequantize()).abs() <= 4e-7 * largest.repeat_interleave(scheme.group_size, 1)).all()
    else:
        assert torch.equal(theirs, again.dequantize())
    return blocks


@pytest.mark.parametrize("kind", SUPER)
def test_any_codes_and_steps_are_written_and_read_bit_for_bit(kind: str) -> None:
    scheme, draw = ggml(kind), torch.Generator().manual_seed(1)
    rows, blocks, groups = 40, COLUMNS // 256, COLUMNS // scheme.group_size

    def whole(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (rows, groups), generator=draw).float()

    lowest, highest = scheme.steps
    scales = torch.randn(rows, blocks, generator=draw).half().float()
    steps = whole(lowest, highest)
    steps[steps == 0] = 1.0
    minima = (torch.rand(rows, blocks, generator=draw).half().float(), whole(0, highest))
    none = (None, None)
    minimum, minimum_steps = minima if scheme.minima else none
    grid = grids_of(kind).grid(Steps(scales, minimum, steps, minimum_steps))
    codes = torch.randint(0, 1 << scheme.bits, (rows, COLUMNS), generator=draw).to(torch.uint8)
    assert_exact(quantized(codes, grid, scheme), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_llama_cpp_are_put_together_again(kind: str) -> None:
    scheme = ggml(kind)
    weight = random_weight(16, COLUMNS)
    theirs = decoded(quantize_rows(weight, None, scheme.ggml_type), scheme)
    found = solved(theirs.dequantize(), kind, None, "rtn", range="search", search=40)
    assert_exact(found.weight, kind)
    assert float(found.error.sum()) < 0.2 * float(solved(weight, kind, None, "rtn").error.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_leaves_far_less_error_than_llama_cpp_with_an_importance_matrix(kind: str, gram: torch.Tensor) -> None:
    scheme, weight = ggml(kind), random_weight(64, COLUMNS)
    theirs = decoded(quantize_rows(weight, gram.diagonal().contiguous(), scheme.ggml_type), scheme)
    most = error(weight, theirs.dequantize(), gram)
    found = {rounds: solved(weight, kind, gram, refinements=rounds) for rounds in (0, 1)}
    for solution in found.values():
        assert_exact(solution.weight, kind)
    left = {rounds: error(weight, each.weight.dequantize(), gram) for rounds, each in found.items()}
    assert left[0] < 0.7 * most, "the columns make up for each other"
    assert left[1] < 0.97 * left[0], "scales and codes are refined"
    assert left[1] == pytest.approx(float(found[1].error.sum()), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_rounds_about_as_well_as_llama_cpp(kind: str) -> None:
    scheme, weight = ggml(kind), random_weight(64, COLUMNS)
    most = (weight - decoded(quantize_rows(weight, None, scheme.ggml_type), scheme).dequantize()).square().sum()
    searched = solved(weight, kind, None, "rtn", range="search")
    spanned = solved(weight, kind, None, "rtn")
    assert_exact(spanned.weight, kind)
    assert float(searched.error.sum()) < 1.06 * float(most)
    assert float(searched.error.sum()) < float(spanned.error.sum())


@pytest.mark.parametrize("kind", SUPER)
def test_a_refit_lowers_the_error_of_rows_and_raises_that_of_none(kind: str, gram: torch.Tensor) -> None:
    grids, weight = grids_of(kind), random_weight(64, COLUMNS)
    found = solved(weight, kind, gram, refinements=0)
    grid = grids.grid(grids.steps(found.weight.parts))
    columns = weight.T.contiguous()
    levels = grids.ungrouped(grids.levels(grids.grouped(found.weight.codes), grid.zeros, torch.float32), weight.shape).T
    problem = Problem(columns, gram, gram, gram @ columns, grids)
    before = problem.attempt(levels.contiguous(), grid)
    refitted = grids.refitted(columns, before.levels, grid, gram)
    assert refitted is not None
    after = problem.attempt(*refitted)
    assert bool((after.error <= before.error * (1 + 1e-4)).all())
    assert float(after.error.sum()) < 0.995 * float(before.error.sum())
    assert torch.equal(codes_of(*refitted, ggml(kind)), found.weight.codes), "codes stay"
    assert not torch.equal(refitted[1].parts["scale_steps"], grid.parts["scale_steps"])
    assert not torch.equal(refitted[1].parts["scale"], grid.parts["scale"])
    descend(columns, refitted[0], problem.spread(refitted[1].scales), problem.rounder(refitted[1]), gram)
    assert float(problem.attempt(*refitted).error.sum()) < float(after.error.sum())


@pytest.mark.parametrize("kind", ["q3_k", "q4_k", "iq4_nl"])
def test_rows_and_experts_are_solved_each_for_itself(kind: str, gram: torch.Tensor) -> None:
    first, second = random_weight(16, COLUMNS, 1), random_weight(16, COLUMNS, 2)
    method, scheme = tiny_method("gptq", refinements=1), ggml(kind)
    other = gram.flip(0).flip(1)
    alone = [
        method.quantize(weight, InputStatistics(TOKENS, gram=seen), scheme, torch.float16).weight
        for weight, seen in ((first, gram), (second, other))
    ]
    together = method.quantize_alike(
        [(first, InputStatistics(TOKENS, gram=gram)), (second, InputStatistics(TOKENS, gram=other))],
        scheme,
        torch.float16,
    )
    for one, two in zip(alone, together, strict=True):
        near(one, two.weight)
    stacked = method.quantize(torch.cat([first, second]), InputStatistics(TOKENS, gram=gram), scheme, torch.float16)
    near(alone[0], stacked.weight.rows(0, 16))
    rows = stacked.weight.rows(16, 32)
    assert torch.equal(encoded(rows), encoded(stacked.weight)[16:])


def near(one: QuantizedWeight, two: QuantizedWeight) -> None:
    """The same but for near ties, which another order of sums may break the other way."""
    assert float((one.codes != two.codes).float().mean()) < 0.02
    assert float((one.scales != two.scales).float().mean()) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_odd_weights_stay_what_they_are(kind: str, gram: torch.Tensor) -> None:
    weight = random_weight(6, COLUMNS)
    weight[0] = 0
    weight[1, :256] = 0
    weight[2, 32:64] = 0
    weight[3] *= 1e-6
    weight[4, :64] = 0.125
    weight[5] = weight[5].abs() + 1
    for rounds in (0, 2):
        found = solved(weight, kind, gram, refinements=rounds)
        assert_exact(found.weight, kind)
        near_to = found.weight.dequantize()
        assert float(near_to[0].abs().max()) <= (1e-6 if kind == "iq4_nl" else 0), "IQ4_NL has no level zero"
        assert float(near_to[3].abs().max()) < 1e-5
        assert bool((found.error <= 1.05 * found.energy + 1e-8).all())
    rounded = solved(weight, kind, None, "rtn").weight
    assert_exact(rounded, kind)
    if kind != "iq4_nl":
        assert torch.equal(rounded.dequantize()[1, :256], weight[1, :256])
        assert torch.equal(rounded.dequantize()[2, 32:64], weight[2, 32:64])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_numbers_that_do_not_fit_are_refused(value: float, kind: str, gram: torch.Tensor) -> None:
    weight = random_weight(4, COLUMNS)
    weight[1, 7] = value
    ways: list[tuple[str, dict[str, object]]] = [("rtn", {}), ("rtn", {"range": "search"}), ("awq", {})]
    for method, keys in ways:
        with pytest.raises(QuantizationError, match="not finite or needs a scale beyond"):
            solved(weight, kind, gram, method, **keys)


def test_gptq_refuses_them_too(gram: torch.Tensor) -> None:
    with pytest.raises(QuantizationError, match="beyond the range of float16, which Q4_K stores"):
        solved(torch.full((2, COLUMNS), 1e9), "q4_k", gram)


def test_errors_that_correlate_count_as_they_do(gram: torch.Tensor) -> None:
    weight = random_weight(32, COLUMNS)
    by_gram = error(weight, solved(weight, "q4_k", gram, "awq").weight.dequantize(), gram)
    by_strength = solved(weight, "q4_k", None, "rtn", range="search").weight
    assert by_gram < error(weight, by_strength.dequantize(), gram)
