"""NF4 and FP4: the codes and scales of bitsandbytes' own quantizer, bit for bit, and solvers that beat it."""

from __future__ import annotations

import math
from typing import Any

import bitsandbytes
import pytest
import torch

from quantkit.errors import QuantizationError, SchemeError
from quantkit.methods.base import InputStatistics, Method, Solution
from quantkit.schemes import Fp4Scheme, Nf4Scheme, QuantizedWeight, Scheme
from quantkit.schemes.codebook import CodebookScheme
from quantkit.schemes.grids.codebook import dynamic_table, nested_parts, nested_scales
from tests.tiny import tiny_method

reference: Any = bitsandbytes.functional
CPU = torch.device("cpu")
SCHEMES = [kind(64, double_quant) for kind in (Nf4Scheme, Fp4Scheme) for double_quant in (True, False)]
SIZES = [Nf4Scheme(size, double_quant) for size in (32, 128, 4096) for double_quant in (True, False)]
names = CodebookScheme.describe
INFINITY = torch.tensor(math.inf)


def rounded(weight: torch.Tensor, scheme: Scheme, **options: object) -> QuantizedWeight:
    solution = tiny_method("rtn", **options).quantize(weight, InputStatistics(), scheme, torch.float32)
    return solution.weight


def assert_identical(weight: torch.Tensor, scheme: CodebookScheme) -> None:
    """What we make of a weight is what bitsandbytes makes of it: codes, scales, and values."""
    packed, state = reference.quantize_4bit(
        weight, blocksize=scheme.group_size, quant_type=scheme.kind, compress_statistics=scheme.double_quant
    )
    found = rounded(weight.float(), scheme)
    codes = torch.cat([packed >> 4, packed & 15], dim=1).view(weight.shape)
    assert torch.equal(found.codes, codes)
    if scheme.double_quant:
        assert torch.equal(found.parts["absmax"].flatten(), state.absmax)
        assert torch.equal(found.parts["nested_absmax"], state.state2.absmax)
        assert torch.equal(found.parts["nested_offset"], state.offset)
        scales = reference.dequantize_blockwise(state.absmax, state.state2) + state.offset
    else:
        assert not found.parts
        scales = state.absmax
    assert torch.equal(found.scales.flatten(), scales)
    assert torch.equal(found.dequantize().to(weight.dtype), reference.dequantize_4bit(packed, state))


def levels_of(scheme: CodebookScheme) -> torch.Tensor:
    """The distinct levels, ascending."""
    return torch.tensor(sorted(set(torch.tensor(scheme.table).tolist())))


def random_weight(rows: int = 48, columns: int = 512, seed: int = 0) -> torch.Tensor:
    """Rows of different strength."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.1) * 0.05


def correlated_gram(columns: int, tokens: int = 1000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(tokens, 24, generator=generator) @ torch.randn(24, columns, generator=generator)
    inputs = shared + torch.randn(tokens, columns, generator=generator)
    inputs *= torch.randn(columns, generator=generator).exp()
    return inputs.T @ inputs / tokens


def layer_error(weight: torch.Tensor, found: QuantizedWeight, gram: torch.Tensor) -> float:
    difference = weight.double() - found.dequantize(torch.float32).double()
    return float(((difference @ gram.double()) * difference).sum())


def test_the_tables_are_those_of_bitsandbytes() -> None:
    assert torch.equal(dynamic_table(CPU), reference.create_dynamic_map())
    for scheme in (Nf4Scheme, Fp4Scheme):
        expected = reference.get_4bit_type(scheme.kind, device="cpu")
        table = torch.tensor(scheme.table)
        assert torch.equal(table, expected)
        assert torch.equal(table.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (5, 192), (64, 576), (300, 1024)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_codes_and_scales_are_those_of_bitsandbytes(
    scheme: CodebookScheme, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    for seed in range(3):
        assert_identical(random_weight(*shape, seed=seed).to(dtype), scheme)


@pytest.mark.parametrize("scheme", SIZES, ids=names)
def test_codes_and_scales_of_other_block_sizes_are_those_of_bitsandbytes(scheme: CodebookScheme) -> None:
    assert_identical(random_weight(24, 8192), scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_ties_fall_as_in_bitsandbytes(scheme: CodebookScheme) -> None:
    """Weights on the thresholds and a rounding error beside them, for ranges that divide them exactly and others."""
    levels = levels_of(scheme)
    thresholds = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    near = torch.cat([thresholds, thresholds.nextafter(INFINITY), thresholds.nextafter(-INFINITY)])
    shares = torch.nn.functional.pad(near, (0, 63 - len(near) % 63), value=0.5).view(-1, 63)
    shares = torch.cat([torch.ones(len(shares), 1), shares], dim=1)
    spans = torch.cat([2.0 ** torch.arange(-8, 8), torch.rand(500, generator=torch.Generator().manual_seed(0))])
    assert_identical((shares.unsqueeze(0) * spans.view(-1, 1, 1)).view(-1, 64), scheme)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-41, 1e-38, 1e-37, 1e-20, 1e20, 1e37])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_weights_of_any_magnitude_are_coded_as_by_bitsandbytes(scheme: CodebookScheme, magnitude: float) -> None:
    assert_identical(random_weight() * magnitude, scheme)
    mixed = random_weight()
    mixed[::3] *= magnitude
    assert_identical(mixed, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_blocks_of_zeros_are_coded_as_by_bitsandbytes(scheme: CodebookScheme) -> None:
    sparse = random_weight(40, 1024)
    sparse[:, 64:192] = 0
    sparse[7] = 0
    for weight in (sparse, torch.zeros(4, 64), -torch.zeros(4, 64), torch.ones(40, 1024)):
        assert_identical(weight, scheme)
        assert bool(rounded(weight, scheme).dequantize().isfinite().all())


def test_scales_are_doubly_quantized_as_by_bitsandbytes() -> None:
    """So many that some lie beside the steps of its look-up table."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(1 << 21, generator=generator)
    parts = nested_parts(scales.view(-1, 64))
    offset = scales.mean()
    codes, state = reference.quantize_blockwise(scales - offset, blocksize=256)
    assert torch.equal(parts["absmax"].flatten(), codes)
    assert torch.equal(parts["nested_absmax"], state.absmax)
    assert torch.equal(nested_scales(parts).flatten(), reference.dequantize_blockwise(codes, state) + offset)


def test_double_quantization_changes_scales_by_less_than_a_hundredth() -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    exact, nested = (rounded(weight, Nf4Scheme(64, double_quant)) for double_quant in (False, True))
    change = (nested.scales / exact.scales - 1).abs()
    assert 0 < float(change.median()) < 0.01
    assert torch.equal(nested.codes, exact.codes), "codes are chosen before the scales are rounded"
    errors = [float((weight - found.dequantize()).square().sum()) for found in (exact, nested)]
    assert errors[1] < 1.01 * errors[0]


def test_bits_per_weight_are_those_of_the_paper() -> None:
    assert Nf4Scheme().bits_per_weight(4096) == pytest.approx(4.127, abs=0.0005)
    assert Nf4Scheme(double_quant=False).bits_per_weight(4096) == 4.5
    assert Fp4Scheme(128, double_quant=False).bits_per_weight(4096) == 4.25


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_searched_scales_beat_the_range(scheme: CodebookScheme) -> None:
    weight = random_weight()
    importance = torch.rand(512, generator=torch.Generator().manual_seed(2)).square()
    statistics = InputStatistics(tokens=9, square_mean=importance)
    searched = tiny_method("rtn", range="weighted").quantize(weight, statistics, scheme, torch.float32).weight
    gram = importance.diag()
    assert layer_error(weight, searched, gram) < 0.9 * layer_error(weight, rounded(weight, scheme), gram)
    assert_consistent(searched)


@pytest.mark.parametrize("refinements", [0, 1])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_gptq_beats_rounding_on_correlated_inputs(scheme: CodebookScheme, refinements: int) -> None:
    weight, gram = random_weight(), correlated_gram(512)
    found = solve(tiny_method("gptq", refinements=refinements), weight, gram, scheme)
    assert layer_error(weight, found.weight, gram) < 0.3 * layer_error(weight, rounded(weight, scheme), gram)
    torch.testing.assert_close(float(found.error.sum()), layer_error(weight, found.weight, gram), rtol=1e-3, atol=0)
    assert_consistent(found.weight)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_refinement_keeps_the_shape_of_what_rows_share(scheme: CodebookScheme) -> None:
    """Of a single row there are as many scales of scales as rows."""
    weight, gram = random_weight()[:1], correlated_gram(512)
    found = solve(tiny_method("gptq", refinements=1), weight, gram, scheme).weight
    parts = rounded(weight, scheme).parts
    assert {name: part.shape for name, part in found.parts.items()} == {name: p.shape for name, p in parts.items()}


def solve(method: Method, weight: torch.Tensor, gram: torch.Tensor, scheme: Scheme) -> Solution:
    statistics = InputStatistics(tokens=1000, gram=gram, square_mean=gram.diagonal())
    return method.quantize(weight, statistics, scheme, torch.float16)


def assert_consistent(found: QuantizedWeight) -> None:
    """Scales are float32, those of their parts, and every code a level."""
    assert found.scales.dtype == torch.float32
    assert int(found.codes.max()) < 16
    assert bool(found.parts) == (not found.scheme.free_scales)
    if found.parts:
        assert torch.equal(found.scales, nested_scales(found.parts))


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_dead_rows_are_solved_without_nan(scheme: CodebookScheme) -> None:
    weight, gram = random_weight(), correlated_gram(512)
    weight[5], weight[9, 64:128], weight[11] = 0, 0, 1e-42
    for method in ("rtn", "gptq"):
        found = solve(tiny_method(method), weight, gram, scheme)
        assert bool(found.weight.dequantize().isfinite().all())
        assert bool(found.error.isfinite().all())
    nothing = solve(tiny_method("gptq"), torch.zeros(8, 512), gram, scheme).weight
    assert float(nothing.dequantize().abs().max()) < 1e-30


@pytest.mark.parametrize("options", [{"range": "minmax"}, {"range": "weighted"}], ids=["minmax", "weighted"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_a_weight_that_is_not_finite_is_refused(scheme: CodebookScheme, value: float, options: dict[str, str]) -> None:
    weight = random_weight(8, 128)
    weight[3, 70] = value
    with pytest.raises(QuantizationError, match="not finite"):
        tiny_method("rtn", **options).quantize(weight, InputStatistics(), scheme, torch.float16)


@pytest.mark.parametrize("scheme", [Nf4Scheme(), Fp4Scheme()], ids=names)
def test_levels_are_found_as_by_a_binary_search(scheme: CodebookScheme) -> None:
    grids, zeros = scheme.grids(), torch.zeros(1, 1)
    levels = levels_of(scheme)
    thresholds = (levels[1:] + levels[:-1]) / 2
    edges = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 2.0**31, -(2.0**31), 3e38, -3e38, math.inf, -math.inf])
    spread = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)) * levels[-1] / 2
    beside = (thresholds.nextafter(INFINITY), thresholds.nextafter(-INFINITY))
    values = torch.cat([edges, levels, *beside, spread])
    expected = levels[torch.bucketize(values, thresholds)]
    assert torch.equal(grids.nearest_(values.clone(), zeros), expected)
    groups = values[: 1 << 18].view(64, 64, 64).transpose(0, 2)
    assert torch.equal(grids.nearest_(groups.clone(), zeros), expected[: 1 << 18].view(64, 64, 64).transpose(0, 2))
    assert bool(grids.nearest_(torch.full((7, 9), math.nan), zeros).isfinite().all())


@pytest.mark.parametrize("kind", [Nf4Scheme, Fp4Scheme])
def test_block_sizes_that_bitsandbytes_lacks_are_refused(kind: type[CodebookScheme]) -> None:
    for size in (-1, 0, 16, 48, 8192):
        with pytest.raises(SchemeError, match=r"no block of .*32, 64, 128"):
            kind(size)
    with pytest.raises(SchemeError, match=r"64 does not divide the 96 input columns.*sizes that do: 32\)"):
        kind(64).groups(96)
    with pytest.raises(SchemeError, match="keep this layer float"):
        kind(64).groups(100)
