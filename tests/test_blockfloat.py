"""MXFP4 and NVFP4: scales and codes of compressed-tensors' own quantizer, the search and GPTQ onto these grids."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import MXFP4PackedCompressor, NVFP4PackedCompressor
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from quantkit.errors import QuantizationError, SchemeError
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.numerics.grid_search import encode, quantized, range_grid, search_grid
from quantkit.schemes import Mxfp4Scheme, Nvfp4Scheme, QuantizedWeight, Scheme
from quantkit.schemes.grids import blockfloat
from tests.layers import assert_same_bytes, correlated_gram, layer_error, package_scheme, random_weight, solved

SCHEMES: list[Scheme] = [Mxfp4Scheme(), Nvfp4Scheme()]
COMPRESSORS = {"mxfp4": MXFP4PackedCompressor, "nvfp4": NVFP4PackedCompressor}
SHAPES = [(1, 32), (24, 96), (37, 160), (130, 512)]


def names(scheme: Scheme) -> str:
    return scheme.describe()


def ties() -> torch.Tensor:
    """Every number half way between two E2M1 numbers and its neighbours in float32, with 6 in every block."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    zero, high = torch.zeros(7), torch.full((7,), 9.0)
    above, below = torch.nextafter(middles, high), torch.nextafter(middles, zero)
    rows = [torch.cat([each, -each, torch.tensor([6.0, -6.0])]) for each in (middles, above, below)]
    return torch.stack(rows).repeat(1, 2) * torch.tensor([[1.0], [2.0], [0.5]])


def rounded(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    grid = range_grid(weight, scheme, torch.bfloat16)
    return quantized(encode(weight, grid, scheme), grid, scheme)


def package_tensors(weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """What the package's quantizer and compressor make of a weight."""
    group = package_scheme(scheme)
    assert group.weights is not None
    blocks = weight.view(weight.shape[0], -1, scheme.group_size)
    state = {"weight": weight}
    if isinstance(scheme, Nvfp4Scheme):
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    state["weight_scale"], _ = calculate_qparams(
        blocks.amin(-1), blocks.amax(-1), group.weights, state.get("weight_global_scale")
    )
    compressed: dict[str, torch.Tensor] = COMPRESSORS[scheme.kind].compress(state, group)
    return compressed


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_scales_and_codes_are_the_packages(scheme: Scheme, shape: tuple[int, int], seed: int) -> None:
    weight = random_weight(*shape, seed)
    assert_same_bytes(CompressedTensors().pack(rounded(weight, scheme)), package_tensors(weight, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize(
    "case", ["zeros", "a zero row", "one strong", "tiny", "subnormal", "huge", "ties", "powers", "signed zeros"]
)
def test_the_ends_of_floating_point_round_as_in_the_package(scheme: Scheme, case: str) -> None:
    weight = random_weight(40, 160)
    strong = weight.clone()
    strong[0, 0] = 1e6
    weight = {
        "zeros": torch.zeros(40, 160),
        "a zero row": torch.where(torch.arange(40).unsqueeze(1) == 7, 0.0, weight),
        "one strong": strong,
        "tiny": weight * 1e-36,
        "subnormal": weight * 1e-41,
        "huge": weight / weight.abs().max() * 2.9e38,
        "ties": ties(),
        "powers": 2.0 ** torch.arange(-80, 80).repeat(40, 1).float() * torch.linspace(1, 2, 40).unsqueeze(1),
        "signed zeros": torch.where(weight < 0, -0.0, weight),
    }[case]
    assert_same_bytes(CompressedTensors().pack(rounded(weight, scheme)), package_tensors(weight, scheme))


def test_of_two_numbers_equally_near_the_even_code_is_taken() -> None:
    found = rounded(ties()[:1], Mxfp4Scheme()).codes
    assert found[0, :7].tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert found[0, 7:14].tolist() == [8, 10, 10, 12, 12, 14, 14]


@pytest.mark.parametrize(("largest", "exponent"), [(1.0, -2), (1.74, -2), (1.75, -1), (1.99, -1), (2.0, -1)])
def test_a_block_of_mxfp4_goes_to_the_next_power_where_its_largest_would_round_to_eight(
    largest: float, exponent: int
) -> None:
    grid = range_grid(torch.full((1, 32), largest), Mxfp4Scheme(), torch.float32)
    assert float(grid.scales) == 2.0**exponent


def test_the_largest_block_of_nvfp4_has_the_largest_local_scale() -> None:
    weight = random_weight(24, 96)
    grid = range_grid(weight, Nvfp4Scheme(), torch.float32)
    local = grid.parts["scales"].view(torch.float8_e4m3fn).float()
    assert float(local.max()) == 448
    torch.testing.assert_close(grid.scales, local / grid.parts["global_scale"], rtol=0, atol=0)
    assert float(grid.parts["global_scale"]) == pytest.approx(448 * 6 / float(weight.abs().max()))


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_levels_and_codes_are_inverse(scheme: Scheme) -> None:
    grids, codes, none = scheme.grids(), torch.arange(16, dtype=torch.uint8), torch.zeros(1)
    levels = grids.levels(codes, none, torch.float32)
    assert torch.equal(grids.codes(levels, none), codes)
    assert torch.equal(grids.nearest_(levels.clone(), none).view(torch.int32), levels.view(torch.int32))
    assert grids.nearest_(torch.tensor([100.0, -7.0]), none).tolist() == [6.0, -6.0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_package_decodes_to_our_weight_in_bfloat16(scheme: Scheme, shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    found = rounded(weight, scheme)
    read = COMPRESSORS[scheme.kind].decompress(CompressedTensors().pack(found), package_scheme(scheme))["weight"]
    assert read.dtype == torch.bfloat16
    torch.testing.assert_close(read, found.dequantize().bfloat16(), rtol=0, atol=0)
    assert float((read.float() - weight).norm() / weight.norm()) < 0.2


@pytest.mark.parametrize("weighing", ["alike", "skewed", "some dead"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_the_search_loses_less_than_the_range(scheme: Scheme, weighing: str) -> None:
    weight = random_weight(300, 2048)
    strength = torch.randn(2048)
    importance = {"alike": None, "skewed": strength.exp(), "some dead": strength.clamp(min=0)}[weighing]
    errors = []
    for grid in (search_grid(weight, importance, scheme, torch.float32, 6), range_grid(weight, scheme, torch.float32)):
        squares = (weight - quantized(encode(weight, grid, scheme), grid, scheme).dequantize()).square()
        errors.append(float((squares if importance is None else squares * importance).sum()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_searched_scales_can_be_stored(scheme: Scheme) -> None:
    """Nothing is lost on the way through the file, and one search of one candidate is the range."""
    weight = random_weight(300, 2048)
    grid = search_grid(weight, None, scheme, torch.float32, 6)
    found = quantized(encode(weight, grid, scheme), grid, scheme)
    store = CompressedTensors()
    back = store.unpack(store.pack(found), scheme)
    for ours, read in ((found.codes, back.codes), (found.scales, back.scales), (found.zeros, back.zeros)):
        torch.testing.assert_close(read, ours, rtol=0, atol=0)
    assert set(back.parts) == set(found.parts)
    assert all(torch.equal(back.parts[name], part) for name, part in found.parts.items())
    single, spanning = search_grid(weight, None, scheme, torch.float32, 1), range_grid(weight, scheme, torch.float32)
    torch.testing.assert_close(single.scales, spanning.scales, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("shape", [(48, 128), (130, 224)], ids=str)
def test_gptq_loses_less_than_rounding_and_its_file_decodes_to_what_it_tells(
    scheme: Scheme, shape: tuple[int, int]
) -> None:
    weight, gram = random_weight(*shape), correlated_gram(shape[1])
    found = solved(weight, gram, scheme, torch.bfloat16, refinements=0)
    error = layer_error(weight, found.weight, gram)
    assert error < 0.8 * layer_error(weight, rounded(weight, scheme), gram)
    assert float(found.error.sum()) == pytest.approx(error, rel=1e-3)
    read = CompressedTensors().unpack(CompressedTensors().pack(found.weight), scheme)
    torch.testing.assert_close(read.dequantize(), found.weight.dequantize(), rtol=0, atol=0)
    refined = solved(weight, gram, scheme, torch.bfloat16, refinements=1)
    assert layer_error(weight, refined.weight, gram) < error


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_per_weight_are_the_bytes_that_the_format_writes(scheme: Scheme, shape: tuple[int, int]) -> None:
    rows, columns = shape
    stored = 8 * sum(
        tensor.nbytes for tensor in CompressedTensors().pack(rounded(random_weight(*shape), scheme)).values()
    )
    assert stored / (rows * columns) == pytest.approx(scheme.bits_per_weight(columns, 16, rows), rel=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(scheme: Scheme, wrong: float) -> None:
    weight = random_weight(24, 96)
    weight[20, 90] = wrong
    with pytest.raises(QuantizationError, match="not finite"):
        range_grid(weight, scheme, torch.float32)
    with pytest.raises(QuantizationError, match="not finite"):
        search_grid(weight, None, scheme, torch.float32, 4)
    with pytest.raises(QuantizationError, match="not finite"):
        solved(weight, correlated_gram(96), scheme, torch.bfloat16)


@pytest.mark.parametrize(("scheme", "columns"), [(Mxfp4Scheme(), 48), (Nvfp4Scheme(), 40)])
def test_a_layer_that_blocks_do_not_divide_is_refused(scheme: Scheme, columns: int) -> None:
    with pytest.raises(SchemeError, match=f"{scheme.kind} has blocks of {scheme.group_size} only"):
        scheme.check_layer(16, columns)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_the_table_goes_to_a_device_once(scheme: Scheme) -> None:
    blockfloat._table.cache_clear()
    values, zeros = torch.empty(2, 3, 16, device="meta"), torch.empty(2, 3, device="meta")
    for _ in range(3):
        grids = scheme.grids().fitted(torch.ones(2, 3, 16))
        grids.nearest_(values, zeros)
        grids.levels(grids.codes(values, zeros), zeros, torch.float32)
    assert blockfloat._table.cache_info().misses == 1


def test_a_block_that_fits_four_better_than_six_takes_the_larger_scale() -> None:
    """Four over six: between 2/3 of the largest weight and it E2M1 has a number only if that one becomes 4."""
    weight = torch.tensor([[6.0, 4.5, -4.5, 3.0] * 4, [12.0] * 16]) * 0.1
    grid = search_grid(weight, None, Nvfp4Scheme(), torch.float32, 6)
    errors = [
        float((weight - quantized(encode(weight, each, Nvfp4Scheme()), each, Nvfp4Scheme()).dequantize()).abs().max())
        for each in (grid, range_grid(weight, Nvfp4Scheme(), torch.float32))
    ]
    assert float(grid.scales[0]) == pytest.approx(0.15, rel=0.06)
    assert errors[0] < 0.6 * errors[1]
