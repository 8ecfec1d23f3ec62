"""FP8: scales and codes of compressed-tensors' own quantizer, shared scales, the search and GPTQ onto this grid."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import FloatQuantizationCompressor
from compressed_tensors.quantization.utils import calculate_qparams
from torch.nn.functional import pad

from quantkit.errors import QuantizationError, SchemeError
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.numerics.grid_search import encode, quantized, range_grid, search_grid
from quantkit.schemes import Fp8Scheme, QuantizedWeight
from quantkit.schemes.floating import BLOCK
from tests.layers import assert_same_bytes, correlated_gram, layer_error, package_scheme, random_weight, solved

SCHEMES = [Fp8Scheme("tensor"), Fp8Scheme("channel"), Fp8Scheme("block")]
SHAPES = [(1, 1), (24, 96), (128, 256), (130, 200), (257, 128)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
names = Fp8Scheme.describe


def ties() -> torch.Tensor:
    """Every number half way between two positive E4M3 numbers, its negative, and the largest, under one scale."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    return torch.cat([middles, -middles, torch.tensor([448.0, -448.0])]).repeat(3, 1) * 2.0**-9


def rounded(weight: torch.Tensor, scheme: Fp8Scheme, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    grid = range_grid(weight, scheme, dtype)
    return quantized(encode(weight, grid, scheme), grid, scheme)


def package_tensors(weight: torch.Tensor, scheme: Fp8Scheme) -> dict[str, torch.Tensor]:
    """What the package's quantizer and compressor make of a weight."""
    group = package_scheme(scheme)
    assert group.weights is not None
    if scheme.granularity == "tensor":
        low, high = weight.min(), weight.max()
    elif scheme.granularity == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        rows, columns = weight.shape
        whole = pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
        blocks = whole.view(whole.shape[0] // BLOCK, BLOCK, -1, BLOCK)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    scales, zeros = calculate_qparams(low, high, group.weights)
    state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
    compressed: dict[str, torch.Tensor] = FloatQuantizationCompressor.compress(state, group)
    return compressed


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scales_and_codes_are_the_packages(scheme: Fp8Scheme, shape: tuple[int, int], seed: int) -> None:
    weight = random_weight(*shape, seed)
    assert_same_bytes(CompressedTensors().pack(rounded(weight, scheme)), package_tensors(weight, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("case", ["zeros", "a zero row", "tiny", "huge", "ties", "signed zeros", "below zero"])
def test_the_ends_of_floating_point_round_as_in_the_package(scheme: Fp8Scheme, case: str) -> None:
    weight = random_weight(40, 160)
    weight = {
        "zeros": torch.zeros(40, 160),
        "a zero row": torch.where(torch.arange(40).unsqueeze(1) == 7, 0.0, weight),
        "tiny": weight * 1e-40,
        "huge": weight / weight.abs().max() * 3e38,
        "ties": ties(),
        "signed zeros": torch.where(weight < 0, -0.0, weight),
        "below zero": torch.where(torch.arange(160) % 2 == 0, -1e-12, weight),
    }[case]
    assert_same_bytes(CompressedTensors().pack(rounded(weight, scheme)), package_tensors(weight, scheme))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_scales_are_the_packages_in_every_dtype(scheme: Fp8Scheme, dtype: torch.dtype) -> None:
    weight = random_weight(150, 140).to(dtype)
    found = CompressedTensors().pack(rounded(weight.float(), scheme, dtype))["weight_scale"]
    torch.testing.assert_close(found, package_tensors(weight, scheme)["weight_scale"], rtol=0, atol=0)


def test_of_two_numbers_equally_near_the_even_one_is_taken() -> None:
    codes = rounded(ties(), Fp8Scheme("tensor")).codes[:, :252]
    assert bool((codes % 2 == 0).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_package_decodes_to_our_weight(scheme: Fp8Scheme, shape: tuple[int, int]) -> None:
    found = rounded(random_weight(*shape), scheme)
    state = CompressedTensors().pack(found)
    read = FloatQuantizationCompressor.decompress(state, package_scheme(scheme))["weight"]
    torch.testing.assert_close(read, found.dequantize(), rtol=0, atol=0)
    assert float((read - random_weight(*shape)).abs().max()) <= float(found.scales.max()) * 16


@pytest.mark.parametrize("weighing", ["alike", "skewed"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_the_search_loses_less_than_the_range(scheme: Fp8Scheme, weighing: str) -> None:
    weight = random_weight(200, 192)
    importance = None if weighing == "alike" else torch.randn(192).exp()
    errors = []
    for grid in (search_grid(weight, importance, scheme, torch.float32, 16), range_grid(weight, scheme, torch.float32)):
        squares = (weight - quantized(encode(weight, grid, scheme), grid, scheme).dequantize()).square()
        errors.append(float((squares if importance is None else squares * importance).sum()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("rows", [100, 300])
def test_searched_scales_are_shared_over_rows(rows: int) -> None:
    """Also where the search goes through the rows in several parts."""
    weight = random_weight(rows, 2048)
    tensor = search_grid(weight, None, Fp8Scheme("tensor"), torch.float32, 8).scales
    assert tensor.shape == (rows, 1)
    assert len(set(tensor.flatten().tolist())) == 1
    block = search_grid(weight, None, Fp8Scheme("block"), torch.float32, 8).scales
    assert block.shape == (rows, 16)
    for start in range(0, rows, BLOCK):
        assert bool((block[start : start + BLOCK] == block[start]).all())
    assert len(set(block.flatten().tolist())) == 16 * -(-rows // BLOCK)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("shape", [(48, 128), (130, 200)], ids=str)
def test_gptq_loses_less_than_rounding_and_its_file_decodes_to_what_it_tells(
    scheme: Fp8Scheme, shape: tuple[int, int]
) -> None:
    weight, gram = random_weight(*shape), correlated_gram(shape[1])
    found = solved(weight, gram, scheme, torch.float32)
    error = layer_error(weight, found.weight, gram)
    assert error < 0.8 * layer_error(weight, rounded(weight, scheme), gram)
    assert float(found.error.sum()) == pytest.approx(error, rel=1e-3)
    read = CompressedTensors().unpack(CompressedTensors().pack(found.weight), scheme)
    torch.testing.assert_close(read.dequantize(), found.weight.dequantize(), rtol=0, atol=0)
    refined = solved(weight, gram, scheme, torch.float32, refinements=1)
    assert layer_error(weight, refined.weight, gram) <= error


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 96), (130, 200), (256, 256)], ids=str)
def test_bits_per_weight_are_the_bytes_that_the_format_writes(
    scheme: Fp8Scheme, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    stored = 8 * sum(t.nbytes for t in CompressedTensors().pack(rounded(random_weight(*shape), scheme, dtype)).values())
    assert stored / (rows * columns) == pytest.approx(
        scheme.bits_per_weight(columns, torch.finfo(dtype).bits, rows), rel=1e-12
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(scheme: Fp8Scheme, wrong: float) -> None:
    weight = random_weight(140, 130)
    weight[135, 129] = wrong
    with pytest.raises(QuantizationError, match="not finite"):
        range_grid(weight, scheme, torch.float32)
    with pytest.raises(QuantizationError, match="not finite"):
        search_grid(weight, None, scheme, torch.float32, 4)
    with pytest.raises(QuantizationError, match="not finite"):
        solved(weight, correlated_gram(130), scheme, torch.float32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_a_scale_beyond_float16_is_refused(scheme: Fp8Scheme) -> None:
    with pytest.raises(QuantizationError, match="beyond the range of float16"):
        range_grid(torch.full((2, 2), 1e5), scheme, torch.float16)


def test_what_fp8_does_not_take() -> None:
    with pytest.raises(SchemeError, match="no granularity 'group'"):
        Fp8Scheme("group")  # type: ignore[arg-type]  # a recipe may say it
    with pytest.raises(SchemeError, match="no activations 'fp8'"):
        Fp8Scheme("tensor", "fp8")  # type: ignore[arg-type]  # a recipe may say it
    with pytest.raises(SchemeError, match="fp8 blocks have no static scale of inputs"):
        Fp8Scheme("block", "static")
    with pytest.raises(SchemeError, match="need a multiple of 128 input columns, not 200"):
        Fp8Scheme("block", "dynamic").check_layer(128, 200)
    Fp8Scheme("block", "dynamic").check_layer(100, 256)
    Fp8Scheme("block").check_layer(100, 200)
