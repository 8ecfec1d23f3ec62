"""compressed-tensors: what we pack is, bit for bit, what the package packs, and it reads what we write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit.errors import SchemeError
from quantkit.formats.compressed_tensors import ASYMMETRIC, FOUR_BIT_FLOATS, CompressedTensors
from quantkit.numerics.grid_search import encode, quantized, range_grid, search_grid
from quantkit.schemes import (
    INTEGER_BITS,
    PER_CHANNEL,
    Fp8Scheme,
    IntScheme,
    Mxfp4Scheme,
    Nf4Scheme,
    Nvfp4Scheme,
    QuantizedWeight,
    Scheme,
)
from quantkit.schemes.bitstream import pack_bits, unpack_bits
from quantkit.system.artifacts import read_json, write_json
from tests.runs import logits
from tests.tiny import int_schemes, make_model

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ODD = [IntScheme(1, 24, False), *(IntScheme(bits, 24, symmetric) for bits in (5, 6, 7) for symmetric in (True, False))]
SCHEMES = [*int_schemes(24), *ODD]
W8A8 = IntScheme(8, PER_CHANNEL, activations="dynamic")
FLOATS: list[Scheme] = [Fp8Scheme("tensor"), Fp8Scheme("channel"), Fp8Scheme("block"), Mxfp4Scheme(), Nvfp4Scheme()]
DYNAMIC: list[Scheme] = [
    W8A8, Fp8Scheme("tensor", "dynamic"), Fp8Scheme("channel", "dynamic"), Fp8Scheme("block", "dynamic")
]  # fmt: skip


def names(scheme: Scheme) -> str:
    return scheme.describe()


def random_weight(scheme: IntScheme, rows: int, columns: int, dtype: torch.dtype) -> QuantizedWeight:
    """Any codes and zeros, and scales of both signs."""
    shape = (rows, scheme.groups(columns))
    zeros = torch.full(shape, scheme.zero) if scheme.symmetric else torch.randint(scheme.levels, shape)
    codes = torch.randint(scheme.levels, (rows, columns)).to(torch.uint8)
    return QuantizedWeight(scheme, codes, torch.randn(shape).mul_(0.02).to(dtype), zeros.to(torch.uint8))


def package_scheme(scheme: Scheme) -> QuantizationScheme:
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
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31, 32, 33, 97])
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


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(3, 70), (5, 1), (1, 33), (1100, 1000)])
def test_bits_of_any_layout_in_memory_are_packed_alike(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack_bits(codes, bits)
    strided = codes.T.contiguous().T
    assert torch.equal(pack_bits(strided, bits), words)
    assert torch.equal(unpack_bits(words.T.contiguous().T, bits, shape[1]), codes)
    stream = sum((int(code) << bits * place for place, code in enumerate(codes[-1])), 0)
    row = b"".join(int(word).to_bytes(4, "little", signed=True) for word in words[-1])
    assert int.from_bytes(row, "little") == stream


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


def rounded(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    grid = range_grid(weight, scheme, dtype)
    return quantized(encode(weight, grid, scheme), grid, scheme)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_w8a8_is_stored_as_the_package_stores_it(seed: int) -> None:
    weight = torch.randn(24, 70, generator=torch.Generator().manual_seed(seed))
    weight[3] = 0
    scheme = package_scheme(W8A8)
    assert scheme.weights is not None
    found = CompressedTensors().pack(rounded(weight, W8A8))
    scales, zeros = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), scheme.weights)
    live = torch.arange(24) != 3  # for zeros the package stores its epsilon, quantkit the smallest number
    torch.testing.assert_close(found["weight_scale"][live], scales[live], rtol=0, atol=0)
    state = {"weight": weight, "weight_scale": found["weight_scale"], "weight_zero_point": zeros}
    wanted = IntQuantizationCompressor.compress(state, scheme)
    assert set(found) == set(wanted) == set(CompressedTensors().layer_suffixes(W8A8))
    assert found["weight"].dtype == torch.int8
    assert torch.equal(found["weight"], wanted["weight"])
    read = IntQuantizationCompressor.decompress(found, scheme)["weight"]
    torch.testing.assert_close(read, rounded(weight, W8A8).dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize("scheme", [*DYNAMIC, *FLOATS], ids=names)
def test_other_layouts_survive_packing(scheme: Scheme) -> None:
    weight = rounded(torch.randn(150, 160), scheme, torch.bfloat16)
    store = CompressedTensors()
    tensors = store.pack(weight)
    assert tuple(tensors) == store.layer_suffixes(scheme)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    back = store.unpack(tensors, scheme)
    assert back.scheme == scheme
    for ours, read in ((weight.codes, back.codes), (weight.scales, back.scales), (weight.zeros, back.zeros)):
        torch.testing.assert_close(read, ours, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", DYNAMIC, ids=names)
def test_activations_are_rounded_as_they_come(scheme: Scheme) -> None:
    args = package_scheme(scheme).input_activations
    assert args is not None
    assert (args.num_bits, args.dynamic, args.symmetric) == (8, True, True)
    assert args.type == ("int" if scheme == W8A8 else "float")
    blocks = isinstance(scheme, Fp8Scheme) and scheme.granularity == "block"
    assert (args.strategy, args.group_size) == (("group", 128) if blocks else ("token", None))


def test_layouts_mix_in_one_checkpoint() -> None:
    layers = {"a": IntScheme(), "b": Fp8Scheme(), "c": Mxfp4Scheme(), "d": Nvfp4Scheme(), "e": W8A8, "lm_head": None}
    config = QuantizationConfig.model_validate(CompressedTensors().quantization_config(layers))
    assert config.format == "mixed-precision"
    groups = [group for group in config.config_groups.values() if isinstance(group, QuantizationScheme)]
    assert {(*group.targets, group.format) for group in groups} == {
        ("a", "pack-quantized"),
        ("b", "float-quantized"),
        ("c", "mxfp4-pack-quantized"),
        ("d", "nvfp4-pack-quantized"),
        ("e", "int-quantized"),
    }


@pytest.mark.parametrize(
    ("scheme", "problem"),
    [
        (IntScheme(4, 64, axis=0), "no groups along axis 0"),
        (IntScheme(4, 64, symmetric=False, zeros="float"), "zero points as codes"),
        (Nf4Scheme(), "cannot store nf4 g64 dq"),
    ],
)
def test_what_no_layout_stores_is_refused(scheme: Scheme, problem: str) -> None:
    with pytest.raises(SchemeError, match=problem) as caught:
        CompressedTensors.check(scheme)
    assert caught.value.remedy


def test_remarks_are_made_where_they_hold() -> None:
    store = CompressedTensors()
    assert store.remarks([IntScheme(), Fp8Scheme(), W8A8]) == ()
    assert store.remarks([IntScheme(), IntScheme(symmetric=False)]) == (ASYMMETRIC,)
    assert store.remarks([Mxfp4Scheme()]) == (FOUR_BIT_FLOATS,)
    assert store.remarks([Nvfp4Scheme(), IntScheme()]) == (FOUR_BIT_FLOATS,)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """Models of which every layer has a multiple of 128 columns."""
    root = tmp_path_factory.mktemp("sources")
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 1}
    made = {dtype: make_model(root / str(dtype), dtype=dtype, **shape) for dtype in (torch.float32, torch.bfloat16)}
    return lambda dtype: made[dtype]


def linears(model: PreTrainedModel) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def export(source: Path, folder: Path, layers: Mapping[str, Scheme | None], dtype: torch.dtype) -> None:
    store, tensors = CompressedTensors(), load_file(source / "model.safetensors")
    for name, scheme in layers.items():
        if scheme is not None:
            weight = rounded(tensors.pop(f"{name}.weight").float(), scheme, dtype)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in store.pack(weight).items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = read_json(source / "config.json") | {"quantization_config": store.quantization_config(layers)}
    write_json(folder / "config.json", config)


def rounding(scheme: Scheme) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], Any]:
    """A hook that rounds a layer's inputs as the scheme asks, by the largest magnitude of each token."""
    blocks = isinstance(scheme, Fp8Scheme) and scheme.granularity == "block"

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        values = inputs[0].view(*inputs[0].shape[:-1], -1, 128) if blocks else inputs[0]
        steps = values.abs().amax(-1, keepdim=True) / (127.5 if scheme == W8A8 else 448)
        if scheme == W8A8:
            found = (values / steps).clamp(-128, 127).round()
        else:
            found = (values / steps).clamp(-448, 448).to(torch.float8_e4m3fn).to(values.dtype)
        return ((found * steps).view_as(inputs[0]),)

    return hook


def decoded(source: Path, folder: Path, layers: Mapping[str, Scheme | None], dtype: torch.dtype) -> PreTrainedModel:
    """The float model with the weights, and the rounding of inputs, that the files stand for."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    store, tensors = CompressedTensors(), load_file(folder / "model.safetensors")
    for name, module in linears(model).items():
        scheme = layers[name]
        if scheme is not None:
            layer = {suffix: tensors[f"{name}.{suffix}"] for suffix in store.layer_suffixes(scheme)}
            module.weight = torch.nn.Parameter(store.unpack(layer, scheme).dequantize().to(dtype))
            if scheme.activations is not None:
                module.register_forward_pre_hook(rounding(scheme))
    return model


def assert_loads_as_it_decodes(
    source: Path, folder: Path, schemes: list[Scheme], dtype: torch.dtype, head: Scheme | None = None
) -> None:
    names = linears(AutoModelForCausalLM.from_pretrained(source))
    layers: dict[str, Scheme | None] = {name: schemes[at % len(schemes)] for at, name in enumerate(names)}
    layers["lm_head"] = head
    export(source, folder, layers, dtype)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    wanted = logits(decoded(source, folder, layers, dtype))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(wanted, logits(AutoModelForCausalLM.from_pretrained(source, dtype=dtype)))


@pytest.mark.parametrize("scheme", [*FLOATS, IntScheme(5, 32), IntScheme(6, 64), IntScheme(7, PER_CHANNEL)], ids=names)
def test_transformers_loads_weights_as_they_decode(
    sources: Callable[[torch.dtype], Path], tmp_path: Path, scheme: Scheme
) -> None:
    dtype = torch.bfloat16 if scheme.kind in ("mxfp4", "nvfp4") else torch.float32
    assert_loads_as_it_decodes(sources(dtype), tmp_path / "out", [scheme], dtype, head=scheme)


@pytest.mark.parametrize("scheme", DYNAMIC, ids=names)
def test_transformers_rounds_activations_too(
    sources: Callable[[torch.dtype], Path], tmp_path: Path, scheme: Scheme
) -> None:
    assert_loads_as_it_decodes(sources(torch.float32), tmp_path / "out", [scheme], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_loads_a_mixture(
    sources: Callable[[torch.dtype], Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    mixture: list[Scheme] = [Fp8Scheme("block"), IntScheme(4, 32), Fp8Scheme("tensor")]
    mixture += [Mxfp4Scheme(), Nvfp4Scheme()] if dtype == torch.bfloat16 else [W8A8]
    assert_loads_as_it_decodes(sources(dtype), tmp_path / "out", mixture, dtype, head=IntScheme(8, 32))
