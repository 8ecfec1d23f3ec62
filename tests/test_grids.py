"""Grids: the search for scales, the sign it may turn, and the weights at the ends of floating point."""

from __future__ import annotations

import pytest
import torch

from quantkit.errors import QuantizationError
from quantkit.numerics.grid_search import (
    codes_of,
    encode,
    quantized,
    range_grid,
    search_grid,
)
from quantkit.numerics.weighing import Weighing
from quantkit.schemes import PER_CHANNEL, Fp8Scheme, IntScheme, Nf4Scheme, Scheme
from quantkit.schemes.grids import Grid
from quantkit.schemes.grids.base import stored
from quantkit.schemes.grids.integer import Limits
from tests.tiny import BITS, int_schemes, spread

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCHEMES = int_schemes(16)
names = IntScheme.describe
CANDIDATES = 8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def decoded(weight: torch.Tensor, grid: Grid, scheme: IntScheme) -> torch.Tensor:
    return quantized(encode(weight, grid, scheme), grid, scheme).dequantize(torch.float32)


def weighted_error(weight: torch.Tensor, grid: Grid, scheme: IntScheme, importance: torch.Tensor | None) -> float:
    squares = (weight - decoded(weight, grid, scheme)).double().square()
    return float((squares if importance is None else squares * importance).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [*SCHEMES, Nf4Scheme(32), Fp8Scheme()], ids=lambda each: each.describe())
def test_what_a_search_judges_by_is_what_is_stored(scheme: Scheme, dtype: torch.dtype) -> None:
    """Coded and decoded in one step, to the bit what codes give."""
    weight = torch.randn(24, 64)
    grids, grid = scheme.grids(), range_grid(weight, scheme, dtype)
    groups = grids.grouped(weight)
    levels = grids.levels(grids.encode(groups, grid), grid.zeros, torch.float32)
    assert torch.equal(grids.through(groups, grid), levels * grid.scales.float().unsqueeze(-1))


@pytest.mark.parametrize("weighing", ["alike", "skewed", "some dead"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_the_search_loses_less_than_the_range(scheme: IntScheme, weighing: str) -> None:
    weight = torch.randn(64, 64) * torch.rand(64, 1)
    importance = {"alike": None, "skewed": torch.randn(64).exp(), "some dead": torch.randn(64).clamp(min=0)}[weighing]
    found = search_grid(weight, importance, scheme, torch.float16, CANDIDATES)
    given = range_grid(weight, scheme, torch.float16)
    assert weighted_error(weight, found, scheme, importance) < weighted_error(weight, given, scheme, importance)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_more_candidates_lose_no_more(scheme: IntScheme) -> None:
    """In total and within rounding: a candidate is chosen before its scale is refitted and its codes rounded anew."""
    weight = torch.randn(64, 64)
    losses = [
        weighted_error(weight, search_grid(weight, None, scheme, torch.float32, count), scheme, None)
        for count in (1, 8, 64)
    ]
    assert losses[1] <= losses[0] * 1.01
    assert losses[2] <= losses[1] * 1.01


@pytest.mark.parametrize("bits", BITS)
def test_a_negative_scale_gives_the_extreme_weight_the_extra_step(bits: int) -> None:
    """A symmetric grid has ``2**(bits-1)`` steps below zero and one less above it.

    With a scale below zero the longer side points up, so that a positive extreme is reached with one step
    more, and the scale is finer by ``zero / (zero - 1/2)`` than the range's, which must serve both signs.
    """
    scheme = IntScheme(bits, PER_CHANNEL)
    weight = torch.tensor([[1.0, *torch.linspace(-0.01, 0.01, 31).tolist()]])
    for sign in (1, -1):
        grid = search_grid(weight * sign, None, scheme, torch.float32, candidates=1)
        assert float(grid.scales) * sign < 0
        codes = encode(weight * sign, grid, scheme)
        assert int(codes[0, 0]) == 0, "the extreme weight takes the lowest code"
        assert float(decoded(weight * sign, grid, scheme)[0, 0]) == pytest.approx(sign, rel=0.02)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_the_scale_is_that_of_least_squares_for_its_codes(scheme: IntScheme) -> None:
    weight, importance = torch.randn(8, 64), torch.rand(64)
    grid = search_grid(weight, importance, scheme, torch.float32, candidates=1)
    groups = scheme.groups(64)
    parts, column_weights = weight.view(8, groups, -1), importance.view(1, groups, -1)
    if scheme.symmetric:
        low, high = parts.amin(-1), parts.amax(-1)
        full = -torch.where(-low >= high, low, high) / scheme.zero
    else:
        full = (parts.amax(-1).clamp(min=0) - parts.amin(-1).clamp(max=0)) / (scheme.levels - 1)
    steps = (parts / full.unsqueeze(-1)).round()
    steps = steps.clamp((-grid.zeros).unsqueeze(-1), (scheme.levels - 1 - grid.zeros).unsqueeze(-1))
    best = (column_weights * parts * steps).sum(-1) / (column_weights * steps.square()).sum(-1)
    torch.testing.assert_close(grid.scales, best, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_every_row_is_searched_by_itself(scheme: IntScheme) -> None:
    """More rows than one chunk of the search takes."""
    weight = torch.randn(1100, 64)
    whole = search_grid(weight, None, scheme, torch.float16, candidates=2)
    part = search_grid(weight[1020:1030], None, scheme, torch.float16, candidates=2)
    torch.testing.assert_close(whole.scales[1020:1030], part.scales, rtol=0, atol=0)
    torch.testing.assert_close(whole.zeros[1020:1030], part.zeros, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [0.0, 1e-42, 1e-38, 1e-20, 1e-9, 1e-6])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_weights_too_small_for_their_scale_give_no_nan(scheme: IntScheme, magnitude: float, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 64)
    weight[:, :16] *= magnitude
    for grid in (search_grid(weight, None, scheme, dtype, CANDIDATES), range_grid(weight, scheme, dtype)):
        assert bool(grid.scales.isfinite().all())
        assert bool((grid.scales != 0).all())
        found = decoded(weight, grid, scheme)
        assert bool(found.isfinite().all())
        assert float((found - weight).square().sum()) <= float(weight.square().sum())


def test_small_8_bit_weights_keep_their_precision_in_float16() -> None:
    """Their scales are below float16's normal numbers, and must not be raised to those."""
    scheme, weight = IntScheme(8, 16), torch.randn(32, 64) * 1e-3
    exact = weighted_error(weight, range_grid(weight, scheme, torch.float32), scheme, None)
    grid = range_grid(weight, scheme, torch.float16)
    assert float(grid.scales.max()) < torch.finfo(torch.float16).tiny
    assert weighted_error(weight, grid, scheme, None) < 1.1 * exact


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_a_group_of_dead_inputs_is_rounded_like_any_other(scheme: IntScheme) -> None:
    """What calibration never saw may come later: its weights are neither lost nor clipped more than the others."""
    weight, importance = torch.randn(16, 64), torch.ones(64)
    importance[16:48] = 0
    if scheme.group_size == PER_CHANNEL:
        importance[:] = 0
    grid = search_grid(weight, importance, scheme, torch.float16, CANDIDATES)
    alike = search_grid(weight, None, scheme, torch.float16, CANDIDATES)
    torch.testing.assert_close(grid.scales, alike.scales, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e8])
def test_a_grid_that_float16_cannot_hold_is_refused(scheme: IntScheme, value: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 5] = value
    with pytest.raises(QuantizationError, match=r"beyond the range of float16.*bfloat16"):
        search_grid(weight, None, scheme, torch.float16, CANDIDATES)
    with pytest.raises(QuantizationError, match=r"beyond the range of float16.*bfloat16"):
        range_grid(weight, scheme, torch.float16)


def test_a_value_of_the_grid_that_overflows_is_refused_though_its_scale_fits() -> None:
    scheme = IntScheme(4, PER_CHANNEL)
    grids, zeros = scheme.grids(), torch.tensor([[8.0]])
    assert float(grids.stored(torch.tensor([[8000.0]]), zeros, torch.float16).scales) == 8000
    with pytest.raises(QuantizationError, match=r"largest value is 65504"):
        grids.stored(torch.tensor([[9000.0]]), zeros, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_scales_are_representable_and_never_zero(dtype: torch.dtype) -> None:
    scales = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-30, 3e-5, -3e-5, 0.1, -7.0])
    found = stored(scales, dtype)
    assert found.dtype == dtype
    assert bool((found != 0).all())
    assert bool((1 / found.float()).isfinite().all())
    torch.testing.assert_close(found[-4:].float(), scales[-4:].to(dtype).float(), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_steps_and_codes_are_two_views_of_one_thing(scheme: IntScheme) -> None:
    weight = torch.randn(8, 64)
    grid = range_grid(weight, scheme, torch.float32)
    codes = encode(weight, grid, scheme)
    steps = codes.T.float() - spread(grid.zeros, 64)
    torch.testing.assert_close(codes_of(steps, grid, scheme), codes, rtol=0, atol=0)
    limits = scheme.grids().rounder(grid, 8, 64)
    assert isinstance(limits, Limits)
    assert bool((steps >= limits.low).all())
    assert bool((steps <= limits.high).all())
    order = torch.randperm(64)
    for column, (low, high) in zip(order.tolist(), limits.ordered(order).columns(), strict=False):
        assert bool((steps[column] >= low).all())
        assert bool((steps[column] <= high).all())
        reached = codes_of(torch.zeros(64, 8) + torch.as_tensor(high), grid, scheme)[:, column]
        assert reached.tolist() == [scheme.levels - 1] * 8


def test_positive_scales_on_request() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    scheme = IntScheme(4, 32, symmetric=True)
    turned = search_grid(weight, None, scheme, torch.float16, CANDIDATES)
    upright = search_grid(weight, None, scheme, torch.float16, CANDIDATES, negative_scales=False)
    assert (turned.scales < 0).any()
    assert (upright.scales > 0).all()
    assert weighted_error(weight, turned, scheme, None) < weighted_error(weight, upright, scheme, None)


JUDGED: list[Scheme] = [
    *SCHEMES,
    *(IntScheme(bits, 16, symmetric=False, zeros="float") for bits in (2, 4)),
    Nf4Scheme(32, double_quant=False),
    Fp8Scheme("channel"),
]


def gram_with_a_strong_mean(columns: int) -> torch.Tensor:
    """Of inputs that are far from zero: most of an output is the sum of its weights, each by a mean."""
    inputs = torch.randn(400, 6) @ torch.randn(6, columns) + 0.3 * torch.randn(400, columns) + 20 * torch.rand(columns)
    return inputs.T @ inputs / 400


def group_losses(weight: torch.Tensor, grid: Grid, scheme: Scheme, gram: torch.Tensor) -> torch.Tensor:
    """The criterion by which groups are judged: ``e H eᵀ`` with the group's block of the Gram matrix."""
    grids = scheme.grids()
    missing = grids.grouped(weight - quantized(encode(weight, grid, scheme), grid, scheme).dequantize(torch.float32))
    return (Weighing.of(grids, gram, weight.shape[1], weight.device)(missing) * missing).sum(-1)


@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("scheme", JUDGED, ids=lambda scheme: scheme.describe())
def test_with_correlations_no_group_comes_out_worse_than_by_its_range(scheme: Scheme, negative: bool) -> None:
    """By the search's own criterion, on the weights as they are stored; in total they come out better."""
    weight, gram = torch.randn(256, 64) * torch.rand(256, 1), gram_with_a_strong_mean(64)
    found = search_grid(weight, gram, scheme, torch.float16, CANDIDATES, negative_scales=negative)
    losses = group_losses(weight, found, scheme, gram)
    given = group_losses(weight, range_grid(weight, scheme, torch.float16), scheme, gram)
    assert bool((losses <= given * 1.0001 + 1e-9).all())
    assert float(losses.sum()) < float(given.sum())


@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("scheme", JUDGED, ids=lambda scheme: scheme.describe())
def test_with_correlations_scales_have_the_sign_that_they_may_have(scheme: Scheme, negative: bool) -> None:
    weight, gram = torch.randn(256, 64) * torch.rand(256, 1), gram_with_a_strong_mean(64)
    scales = search_grid(weight, gram, scheme, torch.float16, CANDIDATES, negative_scales=negative).scales
    if isinstance(scheme, IntScheme) and scheme.symmetric and negative:
        assert bool((scales < 0).any())
    else:
        assert bool((scales > 0).all())
