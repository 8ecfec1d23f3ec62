"""awq: the tensors of AutoAWQ's gemm layout, written, and read whoever wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit.errors import CheckpointError, SchemeError
from quantkit.exports import open_export
from quantkit.formats import FORMATS
from quantkit.formats.awq import AwqFormat
from quantkit.quantization import Job, quantize
from quantkit.recipe import VariantSpec
from quantkit.schemes import PER_CHANNEL, Fp8Scheme, IntScheme, Nf4Scheme, QuantizedWeight, Scheme
from quantkit.system.validation import parse_section
from tests.tiny import make_model, tiny_rows

ROWS, COLUMNS = 24, 64
SUFFIXES = {"qweight", "qzeros", "scales"}
SCHEMES = [IntScheme(4, size, symmetric) for size in (16, PER_CHANNEL) for symmetric in (True, False)]
names = IntScheme.describe


def random_weight(scheme: IntScheme, rows: int, columns: int, dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    """Any codes, any zero points, scales of both signs."""
    shape = (rows, scheme.groups(columns))
    zeros = torch.full(shape, scheme.zero) if scheme.symmetric else torch.randint(scheme.levels, shape)
    codes = torch.randint(scheme.levels, (rows, columns)).to(torch.uint8)
    return QuantizedWeight(scheme, codes, torch.randn(shape).mul_(0.02).to(dtype), zeros.to(torch.uint8))


def assert_same(found: QuantizedWeight, wanted: QuantizedWeight) -> None:
    for ours, other in (
        (found.codes, wanted.codes), (found.scales, wanted.scales), (found.zeros, wanted.zeros)
    ):  # fmt: skip
        assert ours.dtype == other.dtype
        assert torch.equal(ours, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_every_scheme_survives_the_disk(scheme: IntScheme, dtype: torch.dtype, tmp_path: Path) -> None:
    AwqFormat.check(scheme)
    AwqFormat.check_layer(scheme, ROWS, COLUMNS)
    weight, store = random_weight(scheme, ROWS, COLUMNS, dtype), AwqFormat()
    tensors = store.pack(weight)
    assert set(tensors) == set(store.layer_suffixes(scheme)) == SUFFIXES
    save_file(tensors, tmp_path / "layer.safetensors")
    read = load_file(tmp_path / "layer.safetensors")
    found = store.unpack(read, scheme)
    assert found.scheme == scheme
    assert_same(found, weight)
    shapes = {suffix: tuple(tensor.shape) for suffix, tensor in read.items()}
    assert store.layer_shape(shapes, read.__getitem__, scheme) == (ROWS, COLUMNS)


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    rows=st.sampled_from([8, 16, 72]),
    columns=st.sampled_from([16, 48]),
    seed=st.integers(0, 2**31),
)
def test_unpacking_gives_back_what_was_packed(scheme: IntScheme, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = random_weight(scheme, rows, columns)
    assert_same(AwqFormat().unpack(AwqFormat().pack(weight), scheme), weight)


def test_eight_rows_share_a_word_even_ones_first() -> None:
    """As ``[0, 2, 4, 6, 1, 3, 5, 7]`` of AutoAWQ has it, the first in the lowest bits."""
    codes = torch.arange(16, dtype=torch.uint8).unsqueeze(1).repeat(1, 16)
    zeros = torch.arange(15, -1, -1, dtype=torch.uint8).unsqueeze(1)
    scales = torch.arange(16, dtype=torch.float16).unsqueeze(1)
    tensors = AwqFormat().pack(QuantizedWeight(IntScheme(4, 16, False), codes, scales, zeros))
    assert tensors["qweight"].shape == (16, 2)
    assert [word & 0xFFFFFFFF for word in tensors["qweight"][0].tolist()] == [0x75316420, 0xFDB9ECA8]
    assert [word & 0xFFFFFFFF for word in tensors["qzeros"][0].tolist()] == [0x8ACE9BDF, 0x02461357]
    assert tensors["scales"].tolist() == [list(range(16))]


def test_symmetric_zero_points_are_stored_all_the_same() -> None:
    tensors = AwqFormat().pack(random_weight(IntScheme(4, 16), ROWS, COLUMNS))
    assert {word & 0xFFFFFFFF for word in tensors["qzeros"].flatten().tolist()} == {0x88888888}


def test_the_dtype_of_scales_has_16_bits() -> None:
    found = {dtype: AwqFormat.scale_dtype(dtype) for dtype in ("float32", "float16", "bfloat16")}
    assert found == {"float32": "float16", "float16": "float16", "bfloat16": "bfloat16"}


@pytest.mark.parametrize(
    "scheme",
    [
        Nf4Scheme(), Fp8Scheme(), IntScheme(3), IntScheme(8), IntScheme(4, 64, False, "float"),
        IntScheme(4, 64, False, "int", 0), IntScheme(4, 64, desc_act=True),
    ],
)  # fmt: skip
def test_other_schemes_are_refused_with_what_works(scheme: Scheme) -> None:
    with pytest.raises(SchemeError, match=r"does not store .*int schemes of 4 bits along axis 1.*use gptq"):
        AwqFormat.check(scheme)


def test_rows_that_fill_no_whole_words_are_refused() -> None:
    with pytest.raises(SchemeError, match=r"packs 8 output rows into a word, and the layer has 12.*ignore"):
        AwqFormat.check_layer(IntScheme(4), 12, 64)


def test_the_config_tells_one_scheme_and_what_stays_float() -> None:
    scheme = IntScheme(4, 32)
    layers = {"model.layers.0.up_proj": scheme, "model.layers.1.up_proj": None, "lm_head": None}
    assert AwqFormat().quantization_config(layers) == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True, "lm_head": False,
        "modules_to_not_convert": ["model.layers.1.up_proj", "lm_head"],
        "dynamic": {r"-:^model\.layers\.1\.(?:gate_proj|up_proj|gate_up_proj)$": {}},
    }  # fmt: skip
    assert AwqFormat().extra_files(layers) == {}
    assert "dynamic" not in AwqFormat().quantization_config({"model.layers.0.a": scheme, "lm_head": None})
    with pytest.raises(SchemeError, match="holds one scheme, not int4 g32 sym, int4 g32 asym"):
        AwqFormat().quantization_config({"a": scheme, "b": IntScheme(4, 32, False)})


def test_float_layers_whose_names_are_parts_of_others_are_refused() -> None:
    with pytest.raises(SchemeError, match=r"take block.head_norm for a float layer in the awq format, because block"):
        AwqFormat().quantization_config({"block.head_norm": IntScheme(4), "block.head": None})


def test_transformers_gets_what_it_loads() -> None:
    assert AwqFormat.computes_in([IntScheme(4, 128)]) == ("float32", "float16", "bfloat16")
    assert AwqFormat.computes_in([IntScheme(4, 256)]) == ()
    assert FORMATS.get("awq").requires == ("accelerate", "gptqmodel")
    assert AwqFormat().remarks([IntScheme(4, 128)]) == ()
    assert "groups of 256" in AwqFormat().remarks([IntScheme(4, 256)])[0]


CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}


def foreign(folder: Path, config: Mapping[str, Any], weight: QuantizedWeight, **changes: torch.Tensor | None) -> Path:
    """A checkpoint as another tool would write it; tensors that change are replaced, or left out for None."""
    packed = {**AwqFormat().pack(weight), **changes}
    tensors = {f"a.{name}": tensor.contiguous() for name, tensor in packed.items() if tensor is not None}
    folder.mkdir(exist_ok=True)
    save_file({"norm.weight": torch.ones(4), **tensors}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "float16", "quantization_config": dict(config)}))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        CONFIG | {"version": "GEMM"},
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 16, "zero_point": True},
        {"quant_method": "awq", "bits": 4, "group_size": 16, "checkpoint_format": "gemm", "zero_point": False},
        CONFIG | {"group_size": 32, "dynamic": {"a": {"group_size": 16}}},
    ],
)
def test_files_of_other_tools_are_read(config: dict[str, Any], tmp_path: Path) -> None:
    weight = random_weight(IntScheme(4, 16, False), ROWS, COLUMNS)
    export = open_export(foreign(tmp_path, config, weight))
    assert (export.format, dict(export.schemes)) == ("awq", {"a": weight.scheme})
    assert_same(export.weight("a"), weight)
    assert export.shape("a") == (ROWS, COLUMNS)
    assert export.float_names() == ["norm.weight"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": "gemv_fast"}, "version 'gemv_fast' is laid out for one kind of kernel.*gemm"),
        ({"bits": 8}, "layer a has 8 bits"),
        ({"group_size": 24}, "groups of 24 do not divide"),
        ({"group_size": 32}, r"qzeros has shape \[4, 3\].*\[2, 3\]"),
        ({"dynamic": {"-:a": {}}}, "layer a is packed, and 'dynamic' keeps it float"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    folder = foreign(tmp_path, CONFIG | changes, random_weight(IntScheme(4, 16), ROWS, COLUMNS))
    with pytest.raises(CheckpointError, match=problem):
        open_export(folder)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"qzeros": None}, "layer a .* has no tensor 'qzeros'"),
        ({"qweight": torch.zeros(64, 3)}, "a.qweight is float32, not int32"),
        ({"scales": torch.zeros(4, 23, dtype=torch.float16)}, r"a.scales has shape \[4, 23\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    changes: dict[str, torch.Tensor | None], problem: str, tmp_path: Path
) -> None:
    folder = foreign(tmp_path, CONFIG, random_weight(IntScheme(4, 16), ROWS, COLUMNS), **changes)
    with pytest.raises(CheckpointError, match=problem):
        open_export(folder)


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_exported_model_reads_the_same_without_its_manifest(tmp_path: Path, symmetric: bool) -> None:
    """Its config tells all but that zero points are all 8, and the packed layers are near the float ones."""
    source = make_model(tmp_path / "source")
    keys = {"group_size": 32, "symmetric": symmetric}
    spec = parse_section(VariantSpec, {"name": "v", "method": "awq", "format": "awq", **keys}, "v")
    facts = {"reference": "tiny", "relative_to": "the float model", "dtype": "float32"}
    folder = quantize(Job(source, facts, "float32", rows=tiny_rows(), device="cpu"), spec, tmp_path / "out").folder
    ours = open_export(folder)
    weights = {layer: ours.weight(layer) for layer in ours.schemes}
    assert set(ours.schemes.values()) == {IntScheme(4, 32, symmetric)}
    (folder / "manifest.json").unlink()
    theirs = open_export(folder)
    assert set(theirs.schemes.values()) == {IntScheme(4, 32, False)}
    for layer, weight in weights.items():
        assert_same(theirs.weight(layer), weight)
    floats = load_file(source / "model.safetensors")
    layer = "model.layers.1.mlp.down_proj"
    wanted = floats[f"{layer}.weight"]
    assert 0 < (weights[layer].dequantize(torch.float32) - wanted).norm() < 0.25 * wanted.norm()
