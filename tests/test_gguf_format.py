"""gguf: the blocks are those of GGML, and every scheme that they hold is read back exactly."""

from __future__ import annotations

import gguf
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import CheckpointError, QuantizationError, SchemeError
from quantkit.formats import FORMATS
from quantkit.formats.gguf import Gguf
from quantkit.gguf.types import scheme_of, type_of
from quantkit.numerics.grid_search import encode, quantized, range_grid
from quantkit.schemes import PER_CHANNEL, Fp8Scheme, IntScheme, Mxfp4Scheme, Nf4Scheme, QuantizedWeight, Scheme
from tests.layers import random_weight

Q = gguf.GGMLQuantizationType
SYMMETRIC = {4: Q.Q4_0, 5: Q.Q5_0, 8: Q.Q8_0}
ASYMMETRIC = {4: Q.Q4_1, 5: Q.Q5_1}
SIZES = (32, 64, PER_CHANNEL)


def integer_schemes() -> list[IntScheme]:
    """Every width and group size that the format takes."""
    return [
        *(IntScheme(bits, size) for bits in SYMMETRIC for size in SIZES),
        *(IntScheme(bits, size, False, "float") for bits in ASYMMETRIC for size in SIZES),
    ]


def any_weight(scheme: Scheme, rows: int = 6, columns: int = 128, seed: int = 0) -> QuantizedWeight:
    """Any codes, and scales of both signs over the range of float16."""
    draw = torch.Generator().manual_seed(seed)
    shape = (rows, scheme.groups(columns))
    codes = torch.randint(1 << scheme.bits, (rows, columns), generator=draw).to(torch.uint8)
    if isinstance(scheme, Mxfp4Scheme):
        scales = torch.ldexp(torch.ones(shape), torch.randint(-126, 120, shape, generator=draw))
        return QuantizedWeight(scheme, codes, scales, torch.zeros(shape, dtype=torch.uint8))
    scales = torch.randn(shape, generator=draw) * torch.randn(shape, generator=draw).mul_(4).exp() * 1e-4
    if scheme.symmetric:
        zeros = torch.full(shape, 1 << scheme.bits - 1, dtype=torch.uint8)
    else:
        zeros = torch.randn(shape, generator=draw) * 20
    return QuantizedWeight(scheme, codes, scales, zeros)


def assert_same(found: QuantizedWeight, wanted: QuantizedWeight) -> None:
    assert found.scheme == wanted.scheme
    pairs = (found.codes, wanted.codes), (found.scales, wanted.scales), (found.zeros, wanted.zeros)
    for ours, other in pairs:
        assert ours.dtype == other.dtype
        assert torch.equal(ours, other)


def decoded_by_gguf(blocks: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    values: numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.float32]]
    values = gguf.quants.dequantize(blocks.numpy(), Q[type_of(scheme)])
    return torch.from_numpy(values)


@pytest.mark.parametrize("scheme", [*integer_schemes(), Mxfp4Scheme()], ids=lambda scheme: scheme.describe())
def test_what_is_fitted_is_read_back_exactly(scheme: Scheme) -> None:
    store = FORMATS.get("gguf")("bfloat16")
    fitted = store.fitted(any_weight(scheme))
    packed = store.pack(fitted)
    assert set(packed) == set(store.layer_suffixes(scheme)) == {"weight"}
    assert_same(store.unpack(packed, scheme), fitted)
    assert_same(store.fitted(fitted), fitted)


@pytest.mark.parametrize("scheme", [*integer_schemes(), Mxfp4Scheme()], ids=lambda scheme: scheme.describe())
def test_the_package_gguf_decodes_the_blocks_to_our_numbers(scheme: Scheme) -> None:
    store = Gguf()
    fitted = store.fitted(any_weight(scheme))
    theirs, ours = decoded_by_gguf(store.pack(fitted)["weight"], scheme), fitted.dequantize()
    if scheme.symmetric:
        assert torch.equal(ours, theirs)
    else:
        # (code - zero) * scale rounds once more than code * d + m.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=float(theirs.abs().max()) * 3e-7)


@pytest.mark.parametrize("kind", [*SYMMETRIC.values(), *ASYMMETRIC.values(), Q.MXFP4], ids=lambda kind: kind.name)
def test_blocks_by_the_package_gguf_are_read(kind: gguf.GGMLQuantizationType) -> None:
    weight = random_weight(8, 96)
    blocks = torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind))
    scheme = scheme_of(kind.name)
    assert scheme is not None
    found = Gguf().unpack({"weight": blocks}, scheme)
    theirs = decoded_by_gguf(blocks, scheme)
    torch.testing.assert_close(found.dequantize(), theirs, rtol=0, atol=float(theirs.abs().max()) * 3e-7)
    assert torch.equal(decoded_by_gguf(Gguf().pack(found)["weight"], scheme), theirs)


@given(scheme=st.sampled_from(integer_schemes()), seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=40)
def test_any_weight_survives(scheme: IntScheme, seed: int) -> None:
    store = Gguf()
    fitted = store.fitted(any_weight(scheme, seed=seed))
    assert_same(store.unpack(store.pack(fitted), scheme), fitted)


def test_a_solved_weight_changes_only_by_the_rounding_of_its_zeros() -> None:
    scheme, weight = IntScheme(4, 32, False, "float"), random_weight(8, 64)
    grid = range_grid(weight, scheme, torch.float16)
    solved = quantized(encode(weight, grid, scheme), grid, scheme)
    fitted = Gguf().fitted(solved)
    assert torch.equal(fitted.codes, solved.codes)
    assert torch.equal(fitted.scales, solved.scales.float())
    least = solved.zeros.float() * solved.scales.float()
    change = (fitted.dequantize() - solved.dequantize(torch.float32)).abs().view(8, 2, 32).amax(-1)
    assert bool((change <= least.abs() * 2**-10 + 1e-7).all())


def test_scales_are_solved_in_float16_whatever_the_model_is() -> None:
    assert {Gguf.scale_dtype(dtype) for dtype in ("float32", "bfloat16", "float16")} == {"float16"}


def test_a_block_whose_scale_is_zero_is_constant() -> None:
    scheme = IntScheme(4, 32, False, "float")
    block = numpy.zeros(20, dtype=numpy.uint8)
    block[2:4] = numpy.array([0.25], dtype=numpy.float16).view(numpy.uint8)
    block[4:] = 0x5A
    found = Gguf().unpack({"weight": torch.from_numpy(block).view(1, -1)}, scheme)
    assert torch.equal(found.dequantize(), torch.full((1, 32), 0.25))
    assert_same(Gguf().unpack(Gguf().pack(found), scheme), found)


def test_a_group_that_float16_takes_for_constant_is_its_least_value() -> None:
    scheme = IntScheme(4, 32, False, "float")
    codes = torch.arange(32, dtype=torch.uint8).remainder(16).view(1, 32)
    weight = QuantizedWeight(scheme, codes, torch.tensor([[1e-9]]), torch.tensor([[-5e8]]))
    fitted = Gguf().fitted(weight)
    assert torch.equal(fitted.dequantize(), torch.full((1, 32), 0.5))
    assert_same(Gguf().unpack(Gguf().pack(fitted), scheme), fitted)


@pytest.mark.parametrize(("scale", "zero"), [(1e6, 8.0), (float("nan"), 8.0), (1e4, 1e4), (1.0, float("inf"))])
def test_numbers_beyond_float16_are_refused(scale: float, zero: float) -> None:
    scheme = IntScheme(4, 32, False, "float")
    weight = QuantizedWeight(
        scheme, torch.zeros(1, 32, dtype=torch.uint8), torch.tensor([[scale]]), torch.tensor([[zero]])
    )
    with pytest.raises(QuantizationError, match="float16"):
        Gguf().fitted(weight)


def test_a_scale_of_mxfp4_that_is_no_power_of_two_is_refused() -> None:
    weight = any_weight(Mxfp4Scheme())
    weight.scales[0, 0] = 0.75
    with pytest.raises(QuantizationError, match="power of two"):
        Gguf().pack(weight)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (IntScheme(4, 32, False), "least value.*use zeros: float"),
        (IntScheme(8, 32, False, "float"), "no type for int8.*4, 5 or 8 bits"),
        (IntScheme(3, 32), "no type for int3"),
        (IntScheme(4, 48), "blocks of 32.*use group_size: 32"),
        (IntScheme(4, 16), "blocks of 32"),
        (IntScheme(4, 32, False, "float", 0), "neighbours in a row"),
        (IntScheme(4, 32, desc_act=True), "desc_act"),
        (IntScheme(8, PER_CHANNEL, True, activations="dynamic"), "activations"),
        (Fp8Scheme(), "does not store fp8"),
        (Nf4Scheme(), "does not store nf4"),
    ],
    ids=lambda value: value.describe() if isinstance(value, Scheme) else None,
)
def test_what_no_type_holds_is_refused_with_what_does(scheme: Scheme, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Gguf.check(scheme)


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    Gguf.check_layer(IntScheme(4, 32), 7, 96)
    with pytest.raises(SchemeError, match=r"32 weights, and a row has 48.*'ignore'"):
        Gguf.check_layer(IntScheme(4, PER_CHANNEL), 7, 48)


def test_bytes_that_are_no_blocks_are_refused() -> None:
    for scheme in (IntScheme(4, 32), Mxfp4Scheme()):
        with pytest.raises(CheckpointError, match="holds no blocks"):
            Gguf().unpack({"weight": torch.zeros(2, 35, dtype=torch.uint8)}, scheme)


def test_blocks_of_one_group_must_agree() -> None:
    packed = Gguf().pack(Gguf().fitted(any_weight(IntScheme(4, 32))))
    with pytest.raises(CheckpointError, match="unlike scales"):
        Gguf().unpack(packed, IntScheme(4, 64))


def test_a_block_of_mxfp4_that_is_not_a_number_is_refused() -> None:
    blocks = torch.zeros(1, 17, dtype=torch.uint8)
    blocks[0, 0] = 255
    with pytest.raises(CheckpointError, match="NaN"):
        Gguf().unpack({"weight": blocks}, Mxfp4Scheme())


def test_larger_groups_are_said_to_cost_as_much_as_blocks() -> None:
    assert "group_size 32" in Gguf().remarks({IntScheme(4, 64)})[0]
    assert Gguf().remarks({IntScheme(4, 32), Mxfp4Scheme()}) == ()


def test_schemes_of_the_types_are_those_that_pack_to_them() -> None:
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "Q4_K", "Q6_K", "IQ4_NL"):
        scheme = scheme_of(kind)
        assert scheme is not None
        assert type_of(scheme) == kind
    assert scheme_of("IQ2_XXS") is None


def test_blocks_of_llama_cpp_s_own_types_pass_with_their_importance() -> None:
    scheme = scheme_of("IQ4_NL")
    assert scheme is not None
    blocks = torch.randint(256, (2, 36), dtype=torch.uint8)
    blocks[:, 1::18] &= 0x3F  # keeps the scales finite
    weight = Gguf().unpack({"weight": blocks}, scheme)
    assert torch.equal(weight.dequantize(), decoded_by_gguf(blocks, scheme))
    assert set(Gguf().pack(weight)) == {"weight"}
    weight = QuantizedWeight(
        scheme, weight.codes, weight.scales, weight.zeros, {**weight.parts, "importance": torch.ones(64)}
    )
    packed = Gguf().pack(Gguf().fitted(weight))
    assert torch.equal(packed["weight"], blocks)
    assert torch.equal(packed["importance"], torch.ones(64))
    assert_same(Gguf().unpack(packed, scheme), weight)
