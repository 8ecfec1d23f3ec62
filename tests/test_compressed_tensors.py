"""compressed-tensors: what we pack is, bit for bit, what the package packs, and it reads what we write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit.formats.compressed_tensors import CompressedTensors, pack_bits, unpack_bits
from quantkit.numerics.grids import encode, quantized, search_grid
from quantkit.schemes import INTEGER_BITS, PER_CHANNEL, IntScheme, QuantizedWeight

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCHEMES = [
    IntScheme(bits, group_size, symmetric)
    for bits in INTEGER_BITS
    for group_size in (24, PER_CHANNEL)
    for symmetric in (True, False)
]
names = IntScheme.describe


def random_weight(scheme: IntScheme, rows: int, columns: int, dtype: torch.dtype) -> QuantizedWeight:
    """Any codes and zeros, and scales of both signs."""
    shape = (rows, scheme.groups(columns))
    zeros = torch.full(shape, scheme.zero) if scheme.symmetric else torch.randint(scheme.levels, shape)
    codes = torch.randint(scheme.levels, (rows, columns)).to(torch.uint8)
    return QuantizedWeight(scheme, codes, torch.randn(shape).mul_(0.02).to(dtype), zeros.to(torch.uint8))


def package_scheme(scheme: IntScheme) -> QuantizationScheme:
    """The package's reading of the config that we write for a scheme."""
    config = CompressedTensors().quantization_config({"layer": scheme})
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    assert isinstance(group, QuantizationScheme)
    return group


def decompressed(tensors: dict[str, torch.Tensor], scheme: IntScheme) -> torch.Tensor:
    weight: torch.Tensor = PackedQuantizationCompressor.decompress(tensors, package_scheme(scheme))["weight"]
    return weight


def signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Our unsigned codes as the package's signed ones."""
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


@pytest.mark.parametrize("bits", INTEGER_BITS)
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31, 32, 33, 63, 97, 128])
def test_packed_words_are_those_of_the_package(bits: int, columns: int) -> None:
    codes = torch.randint(1 << bits, (5, columns), dtype=torch.uint8)
    expected = pack_to_int32(signed(codes, bits), bits)
    torch.testing.assert_close(pack_bits(codes, bits), expected, rtol=0, atol=0)
    read = unpack_from_int32(pack_bits(codes, bits), bits, codes.shape)
    torch.testing.assert_close(read, signed(codes, bits), rtol=0, atol=0)


@pytest.mark.parametrize("bits", INTEGER_BITS)
@pytest.mark.parametrize("rows", [1, 6, 32, 45])
def test_zero_points_are_packed_along_the_rows_as_the_package_does(bits: int, rows: int) -> None:
    weight = random_weight(IntScheme(bits, 8, symmetric=False), rows, 40, torch.float16)
    expected = pack_to_int32(signed(weight.zeros, bits), bits, packed_dim=0)
    packed = CompressedTensors().pack(weight)["weight_zero_point"]
    torch.testing.assert_close(packed, expected, rtol=0, atol=0)
    assert packed.is_contiguous()


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(INTEGER_BITS),
    rows=st.integers(1, 9),
    columns=st.integers(1, 100),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_unpacking_gives_back_what_was_packed(bits: int, rows: int, columns: int, transposed: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    if transposed:
        codes = codes.T
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (codes.shape[0], -(-codes.shape[1] * bits // 32))
    torch.testing.assert_close(unpack_bits(words, bits, codes.shape[1]), codes, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_a_layer_survives_packing(scheme: IntScheme, dtype: torch.dtype) -> None:
    weight = random_weight(scheme, 13, 72, dtype)
    store = CompressedTensors()
    tensors = store.pack(weight)
    assert set(tensors) == set(store.layer_suffixes(scheme))
    back = store.unpack(tensors, scheme)
    assert back.scheme == scheme
    for ours, read in zip(
        (weight.codes, weight.scales, weight.zeros), (back.codes, back.scales, back.zeros), strict=True
    ):
        torch.testing.assert_close(read, ours, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_the_package_decompresses_to_our_dequantized_weight(scheme: IntScheme, dtype: torch.dtype) -> None:
    """To the last bit, with scales of both signs: nothing in the package asks for a positive one."""
    weight = random_weight(scheme, 13, 72, dtype)
    assert bool((weight.scales < 0).any())
    read = decompressed(CompressedTensors().pack(weight), scheme)
    assert read.dtype == dtype
    torch.testing.assert_close(read, weight.dequantize(), rtol=0, atol=0)


def test_negative_scales_of_the_search_survive_disk_and_package(tmp_path: Path) -> None:
    """Symmetric groups whose extreme weight is positive are given a negative scale."""
    scheme = IntScheme(4, 16)
    source = torch.randn(8, 64)
    grid = search_grid(source, None, scheme, torch.float16, candidates=8)
    weight = quantized(encode(source, grid, scheme), grid, scheme)
    parts = source.view(8, 4, 16)
    positive_extreme = parts.amax(-1) > -parts.amin(-1)
    torch.testing.assert_close(weight.scales < 0, positive_extreme)
    save_file(CompressedTensors().pack(weight), tmp_path / "layer.safetensors")
    read = decompressed(load_file(tmp_path / "layer.safetensors"), scheme)
    torch.testing.assert_close(read, weight.dequantize(), rtol=0, atol=0)
    assert float((read.float() - source).abs().max()) < 0.5


def test_layers_that_were_solved_stacked_can_be_saved_side_by_side(tmp_path: Path) -> None:
    stacked = random_weight(IntScheme(4, 16, symmetric=False), 24, 32, torch.float16)
    store = CompressedTensors()
    tensors = {
        f"{start}.{suffix}": tensor
        for start in (0, 8, 16)
        for suffix, tensor in store.pack(stacked.rows(start, start + 8)).items()
    }
    save_file(tensors, tmp_path / "layers.safetensors")
    read = load_file(tmp_path / "layers.safetensors")
    for start in (0, 8, 16):
        layer = {suffix: read[f"{start}.{suffix}"] for suffix in store.layer_suffixes(stacked.scheme)}
        expected = stacked.rows(start, start + 8).dequantize()
        torch.testing.assert_close(store.unpack(layer, stacked.scheme).dequantize(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_the_package_reads_our_config_as_the_same_scheme(scheme: IntScheme) -> None:
    args = package_scheme(scheme).weights
    assert isinstance(args, QuantizationArgs)
    assert args.num_bits == scheme.bits
    assert args.symmetric == scheme.symmetric
    assert args.type == "int"
    assert not args.dynamic
    assert args.actorder is None
    assert args.strategy == ("channel" if scheme.group_size == PER_CHANNEL else "group")
    assert args.group_size == (None if scheme.group_size == PER_CHANNEL else scheme.group_size)


def test_one_scheme_targets_every_linear_and_ignores_what_stays_float() -> None:
    scheme = IntScheme()
    config = CompressedTensors().quantization_config({"a.q_proj": scheme, "a.k_proj": scheme, "lm_head": None})
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"
    assert config["ignore"] == ["lm_head"]
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]


def test_several_schemes_name_their_layers() -> None:
    four, eight = IntScheme(4), IntScheme(8, PER_CHANNEL)
    layers = {"a.q_proj": four, "a.down_proj": eight, "b.q_proj": four, "lm_head": None}
    config = CompressedTensors().quantization_config(layers)
    first, second = config["config_groups"].values()
    assert first["targets"] == ["a.q_proj", "b.q_proj"]
    assert first["weights"]["num_bits"] == 4
    assert second["targets"] == ["a.down_proj"]
    assert second["weights"]["num_bits"] == 8
    assert QuantizationConfig.model_validate(config).ignore == ["lm_head"]
