"""Schemes: what they refuse, what they cost, and what their codes mean."""

from __future__ import annotations

import re

import pytest
import torch

from quantkit.errors import SchemeError
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.schemes import PER_CHANNEL, IntScheme, QuantizedWeight, dividing_group_sizes
from tests.tiny import BITS


def random_weight(scheme: IntScheme, rows: int, columns: int, dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    shape = (rows, scheme.groups(columns))
    zeros = torch.full(shape, scheme.zero) if scheme.symmetric else torch.randint(scheme.levels, shape)
    codes = torch.randint(scheme.levels, (rows, columns)).to(torch.uint8)
    return QuantizedWeight(scheme, codes, torch.randn(shape).to(dtype), zeros.to(torch.uint8))


@pytest.mark.parametrize("bits", [-1, 0, 9, 16])
def test_a_width_that_does_not_exist_is_refused_with_those_that_do(bits: int) -> None:
    with pytest.raises(SchemeError, match=f"bits {bits} .*allowed: 1, 2, 3, 4, 5, 6, 7, 8"):
        IntScheme(bits=bits)


@pytest.mark.parametrize("size", [0, -2, -128])
def test_a_group_size_that_is_not_positive_is_refused(size: int) -> None:
    with pytest.raises(SchemeError, match=f"group_size {size} is not positive .*-1"):
        IntScheme(group_size=size)


@pytest.mark.parametrize("columns", [576, 1536, 100, 2000, 11008, 5504, 97, 1009, 14])
def test_the_remedy_for_a_group_size_that_does_not_divide_names_sizes_that_do(columns: int) -> None:
    wrong = next(size for size in (128, 64, 7) if columns % size)
    with pytest.raises(SchemeError) as caught:
        IntScheme(group_size=wrong).groups(columns)
    assert f"group_size {wrong} " in caught.value.problem
    assert f"{columns} input columns" in caught.value.problem
    named = [int(size) for size in re.findall(r"-?\d+", caught.value.remedy)]
    assert named[-1] == PER_CHANNEL
    assert named[:-1] == dividing_group_sizes(columns)
    for size in named:
        assert IntScheme(group_size=size).groups(columns) >= 1


def test_the_remedy_prefers_the_sizes_of_common_kernels() -> None:
    assert dividing_group_sizes(1536) == [128, 64, 32, 256, 16]
    assert dividing_group_sizes(576) == [64, 32, 16]
    assert dividing_group_sizes(100)[:2] == [50, 25]
    assert dividing_group_sizes(1009) == []


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 128, PER_CHANNEL])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bits_per_weight_are_the_bytes_that_a_format_writes(bits: int, group_size: int, symmetric: bool) -> None:
    scheme, rows, columns = IntScheme(bits, group_size, symmetric), 64, 256
    tensors = CompressedTensors().pack(random_weight(scheme, rows, columns))
    tensors.pop("weight_shape")
    stored = 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert stored == scheme.bits_per_weight(columns) * rows * columns


def test_bits_per_weight_fall_short_of_odd_shapes_by_no_more_than_their_last_words() -> None:
    scheme, rows, columns = IntScheme(3, 37, symmetric=False), 5, 111
    tensors = CompressedTensors().pack(random_weight(scheme, rows, columns))
    stored = 8 * sum(tensors[name].nbytes for name in ("weight_packed", "weight_scale", "weight_zero_point"))
    exact = scheme.bits_per_weight(columns) * rows * columns
    assert exact <= stored < exact + 32 * rows + 32 * scheme.groups(columns)


def test_known_costs() -> None:
    assert IntScheme(4, 64).bits_per_weight(4096) == 4.25
    assert IntScheme(4, 128, symmetric=False).bits_per_weight(4096) == 4 + 20 / 128
    assert IntScheme(8, PER_CHANNEL).bits_per_weight(1024) == 8 + 16 / 1024
    assert IntScheme(2, 32).bits_per_weight(4096, scale_bits=32) == 3


def test_describe_names_every_part() -> None:
    assert IntScheme(4, 64).describe() == "int4 g64 sym"
    assert IntScheme(8, PER_CHANNEL, symmetric=False).describe() == "int8 channel asym"


def test_dequantize_follows_the_definition() -> None:
    scheme = IntScheme(4, 2, symmetric=False)
    weight = QuantizedWeight(
        scheme,
        codes=torch.tensor([[0, 15, 3, 4]], dtype=torch.uint8),
        scales=torch.tensor([[0.5, -2.0]]),
        zeros=torch.tensor([[8, 3]], dtype=torch.uint8),
    )
    assert weight.dequantize().tolist() == [[-4.0, 3.5, 0.0, -2.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantize_computes_in_the_dtype_of_the_scales_unless_told(dtype: torch.dtype) -> None:
    weight = random_weight(IntScheme(8, 16, symmetric=False), 4, 64, dtype)
    assert weight.dequantize().dtype == dtype
    exact = weight.dequantize(torch.float32)
    # A whole step of 8 bits is exact in every dtype, so that only the product is rounded.
    torch.testing.assert_close(weight.dequantize(), exact.to(dtype), rtol=0, atol=0)


def test_rows_are_the_same_rows() -> None:
    weight = random_weight(IntScheme(4, 16, symmetric=False), 6, 32)
    torch.testing.assert_close(weight.rows(2, 5).dequantize(), weight.dequantize()[2:5], rtol=0, atol=0)
