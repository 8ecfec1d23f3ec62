"""Scales that are chosen when the column solver comes to their groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics, Solution
from quantkit.methods.gptq import Gptq, GptqOptions
from quantkit.numerics.factor import Curvature
from quantkit.schemes import IntScheme, Mxfp4Scheme, Nvfp4Scheme, Scheme
from quantkit.schemes.codebook import Nf4Scheme
from tests.layers import correlated_gram, layer_error, random_weight

SCHEMES: list[Scheme] = [
    Nvfp4Scheme(),
    Mxfp4Scheme(),
    Nf4Scheme(double_quant=False),
    IntScheme(group_size=64),
    IntScheme(bits=3, group_size=32, symmetric=False),
]
ROWS, COLUMNS = 72, 192


def names(scheme: Scheme) -> str:
    return scheme.describe()


def solved(weight: torch.Tensor, gram: torch.Tensor, scheme: Scheme, **options: Any) -> Solution:
    options = {"damping": 0.03, "refinements": 0, "range_weights": "inputs", **options}
    return Gptq(GptqOptions(**options)).quantize(weight, InputStatistics(gram=gram), scheme, torch.bfloat16)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_scales_in_turn_lose_less_than_those_chosen_before(scheme: Scheme) -> None:
    lost = {"in_turn": 0.0, "before": 0.0}
    for seed in (0, 1, 2):
        weight, gram = random_weight(ROWS, COLUMNS, seed), correlated_gram(COLUMNS)
        for scales in lost:
            found = solved(weight, gram, scheme, scales=scales, search=9)
            assert float(found.error.sum()) == pytest.approx(layer_error(weight, found.weight, gram), rel=1e-3)
            lost[scales] += float((found.error / found.energy).mean())
    assert lost["in_turn"] < 0.98 * lost["before"]


def test_they_are_the_default_of_nvfp4_alone() -> None:
    weight, gram = random_weight(ROWS, COLUMNS), correlated_gram(COLUMNS)
    for scheme, usual in ((Nvfp4Scheme(), "in_turn"), (Mxfp4Scheme(), "before"), (IntScheme(group_size=64), "before")):
        chosen = solved(weight, gram, scheme, scales=usual).weight
        assert torch.equal(solved(weight, gram, scheme).weight.codes, chosen.codes)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_the_first_group_has_the_scale_that_loses_least(scheme: Scheme) -> None:
    """In float64, by the loss with all other columns free: ``e (U'U)⁻¹ e`` with U of the group alone."""
    weight, gram = random_weight(24, COLUMNS), correlated_gram(COLUMNS)
    size = scheme.columns_per_group(COLUMNS)
    found = solved(weight, gram, scheme, scales="in_turn", search=6, activation_order=False).weight
    factor = Curvature.of(gram, 0.03, None).factor[:size, :size].double()
    grids = scheme.grids().fitted(scheme.grids().grouped(weight))
    groups = weight[:, :size].unsqueeze(1).contiguous()
    losses = []
    for tried in grids.candidates(groups, 6, negative_scales=True):
        grid = grids.rounded(*tried, torch.bfloat16)
        free = weight[:, :size].double()
        lost = torch.zeros(24, dtype=torch.float64)
        for column in range(size):
            level = (free[:, column] / grid.scales[:, 0]).float().view(-1, 1, 1)
            value = grids.nearest_(level, grid.zeros).view(-1).double() * grid.scales[:, 0].double()
            error = (free[:, column] - value) / factor[column, column]
            free[:, column:] -= error.unsqueeze(1) * factor[column, column:]
            lost += error.square()
        losses.append(lost)
    missed = (weight - found.dequantize(torch.float32))[:, :size].double()
    whitened = torch.linalg.solve_triangular(factor, missed, upper=True, left=False)
    least = torch.stack(losses).amin(0)
    assert float((whitened.square().sum(1) / least).max()) < 1.001


def test_groups_of_nvfp4_are_solved_in_the_order_of_what_they_lose() -> None:
    """By inputs alone some of these layers lose more than in no order at all."""
    lost = {True: 0.0, False: 0.0}
    for seed in range(4):
        weight, gram = random_weight(ROWS, COLUMNS, seed), correlated_gram(COLUMNS)
        for ordered in lost:
            found = solved(weight, gram, Nvfp4Scheme(), activation_order=ordered)
            lost[ordered] += float((found.error / found.energy).mean())
    assert lost[True] < 0.8 * lost[False]


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_layers_solved_together_and_rows_apart_come_out_the_same(scheme: Scheme) -> None:
    weights = [random_weight(ROWS, COLUMNS, seed) for seed in (0, 1)]
    grams = [correlated_gram(COLUMNS), correlated_gram(COLUMNS, 250).flip(0, 1)]
    method = Gptq(GptqOptions(scales="in_turn"))
    given = [(weight, InputStatistics(gram=gram)) for weight, gram in zip(weights, grams, strict=True)]
    for alone, one in zip(method.quantize_alike(given, scheme, torch.bfloat16), given, strict=True):
        assert torch.equal(alone.weight.codes, method.quantize(*one, scheme, torch.bfloat16).weight.codes)
    if not isinstance(scheme, Nvfp4Scheme):  # whose rows share a scale
        part = method.quantize(weights[0][:40], InputStatistics(gram=grams[0]), scheme, torch.bfloat16)
        whole = method.quantize(*given[0], scheme, torch.bfloat16)
        assert torch.equal(part.weight.codes, whole.weight.codes[:40])


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_zeros_and_numbers_that_are_not_finite(scheme: Scheme) -> None:
    weight, gram = random_weight(24, COLUMNS), correlated_gram(COLUMNS)
    weight[3] = 0
    weight[:, :64] = 0
    assert float(solved(weight, gram, scheme, scales="in_turn").weight.dequantize()[3].abs().max()) == 0
    for wrong in (float("nan"), float("inf")):
        weight[20, 90] = wrong
        with pytest.raises(QuantizationError, match="not finite"):
            solved(weight, gram, scheme, scales="in_turn")
