"""gptq: the tensors of AutoGPTQ and gptqmodel, written, and read whoever wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError, SchemeError
from quantkit.exports import open_export
from quantkit.formats import FORMATS
from quantkit.formats.gptq import GptqFormat
from quantkit.quantization import Job, quantize
from quantkit.recipe import VariantSpec
from quantkit.schemes import PER_CHANNEL, Fp8Scheme, IntScheme, Nf4Scheme, QuantizedWeight, Scheme
from quantkit.system.validation import parse_section
from tests.tiny import BITS, make_model, tiny_rows

ROWS, COLUMNS = 32, 64
SUFFIXES = {"qweight", "qzeros", "scales", "g_idx"}
names = IntScheme.describe


def all_schemes() -> list[IntScheme]:
    return [
        scheme
        for bits in BITS
        for symmetric in (True, False)
        for scheme in (
            IntScheme(bits, PER_CHANNEL, symmetric),
            IntScheme(bits, 16, symmetric),
            IntScheme(bits, 16, symmetric, desc_act=True),
        )
    ]


def random_weight(scheme: IntScheme, rows: int, columns: int, dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    """Any codes, any zero points, scales of both signs, and if asked for groups of columns in any order."""
    shape = (rows, scheme.groups(columns))
    zeros = torch.full(shape, scheme.zero) if scheme.symmetric else torch.randint(scheme.levels, shape)
    codes = torch.randint(scheme.levels, (rows, columns)).to(torch.uint8)
    groups = (torch.randperm(columns) // scheme.columns_per_group(columns)).to(torch.int32)
    scales = torch.randn(shape).mul_(0.02).to(dtype)
    return QuantizedWeight(scheme, codes, scales, zeros.to(torch.uint8), {"g_idx": groups} if scheme.desc_act else {})


def assert_same(found: QuantizedWeight, wanted: QuantizedWeight) -> None:
    assert found.scheme == wanted.scheme
    assert set(found.parts) == set(wanted.parts)
    pairs = [(found.codes, wanted.codes), (found.scales, wanted.scales), (found.zeros, wanted.zeros)]
    for ours, other in [*pairs, *((found.parts[name], wanted.parts[name]) for name in wanted.parts)]:
        assert ours.dtype == other.dtype
        assert torch.equal(ours, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", all_schemes(), ids=names)
def test_every_scheme_survives_the_disk(scheme: IntScheme, dtype: torch.dtype, tmp_path: Path) -> None:
    GptqFormat.check(scheme)
    GptqFormat.check_layer(scheme, ROWS, COLUMNS)
    weight, store = random_weight(scheme, ROWS, COLUMNS, dtype), GptqFormat()
    tensors = store.pack(weight)
    assert set(tensors) == set(store.layer_suffixes(scheme)) == SUFFIXES
    save_file(tensors, tmp_path / "layer.safetensors")
    read = load_file(tmp_path / "layer.safetensors")
    assert_same(store.unpack(read, scheme), weight)
    shapes = {suffix: tuple(tensor.shape) for suffix, tensor in read.items()}
    assert store.layer_shape(shapes, read.__getitem__, scheme) == (ROWS, COLUMNS)


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(all_schemes()),
    rows=st.sampled_from([32, 64, 96]),
    columns=st.sampled_from([32, 64, 160]),
    less=st.sampled_from([None, 0, 1]),
    seed=st.integers(0, 2**31),
)
def test_unpacking_gives_back_what_was_packed(
    scheme: IntScheme, rows: int, columns: int, less: int | None, seed: int
) -> None:
    """Zero points of 0 too, and in either way of telling them."""
    torch.manual_seed(seed)
    weight, store = random_weight(scheme, rows, columns), GptqFormat(less=less)
    assert_same(store.unpack(store.pack(weight), scheme), weight)


def column(tensor: torch.Tensor) -> int:
    """The first column of int32 words as one number, the first word lowest."""
    return sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(tensor[:, 0].tolist()))


@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_one_after_another_down_a_column(bits: int) -> None:
    scheme = IntScheme(bits, 16, False)
    weight = random_weight(scheme, ROWS, COLUMNS)
    tensors = GptqFormat().pack(weight)
    assert tensors["qweight"].shape == (COLUMNS * bits // 32, ROWS)
    assert column(tensors["qweight"]) == sum(
        code << bits * place for place, code in enumerate(weight.codes[0].tolist())
    )
    assert tensors["qzeros"].shape == (COLUMNS // 16, ROWS * bits // 32)
    stored = [zero << bits * place for place, zero in enumerate(weight.zeros[:, 0].tolist())]
    assert column(tensors["qzeros"].T) == sum(stored)
    assert torch.equal(tensors["scales"], weight.scales.T)
    assert tensors["g_idx"].tolist() == [place // 16 for place in range(COLUMNS)]


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_zero_points_are_stored_less_one(bits: int) -> None:
    scheme = IntScheme(bits, PER_CHANNEL)
    tensors = GptqFormat().pack(random_weight(scheme, ROWS, COLUMNS))
    assert column(tensors["qzeros"].T) == sum((scheme.zero - 1) << bits * place for place in range(ROWS))
    assert tensors["g_idx"].tolist() == [0] * COLUMNS


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_of_zero_come_back_from_what_gptqmodel_makes_of_them(bits: int) -> None:
    """It subtracts one from all fields of a word at once, which borrows from the next; in 3 bits from each alone."""
    scheme = IntScheme(bits, 16, False)
    weight = random_weight(scheme, ROWS, COLUMNS)
    weight.zeros[::3] = 0
    tensors = GptqFormat().pack(weight)
    if bits == 3:
        fields = [(int(zero) - 1) % 8 << 3 * place for place, zero in enumerate(weight.zeros[:, 0])]
        wanted = sum(fields)
    else:
        ones = sum(1 << place for place in range(0, 32, bits))
        words = [(word - ones) % (1 << 32) for word in tensors["qzeros"][0].tolist()]
        wanted = sum(word << 32 * place for place, word in enumerate(words))
    stored = GptqFormat(less=1).pack(weight)
    assert column(stored["qzeros"].T) == wanted
    assert_same(GptqFormat(less=1).unpack(stored, scheme), weight)


def test_the_dtype_of_scales_has_16_bits() -> None:
    found = {dtype: GptqFormat.scale_dtype(dtype) for dtype in ("float32", "float16", "bfloat16")}
    assert found == {"float32": "float16", "float16": "float16", "bfloat16": "bfloat16"}


@pytest.mark.parametrize(
    "scheme",
    [
        Nf4Scheme(), Fp8Scheme(), IntScheme(5), IntScheme(4, 64, False, "float"), IntScheme(4, 64, False, "int", 0),
        IntScheme(8, PER_CHANNEL, activations="dynamic"),
    ],
)  # fmt: skip
def test_other_schemes_are_refused_with_what_works(scheme: Scheme) -> None:
    with pytest.raises(SchemeError, match=r"does not store .*2, 3, 4 and 8 bits along axis 1"):
        GptqFormat.check(scheme)


@pytest.mark.parametrize(
    ("bits", "rows", "columns", "what"),
    [(3, 32, 48, "48 input columns"), (4, 12, 64, "12 output rows"), (8, 64, 30, "30 input columns")],
)
def test_layers_that_fill_no_whole_words_are_refused(bits: int, rows: int, columns: int, what: str) -> None:
    with pytest.raises(SchemeError, match=rf"{what} of {bits} bits do not fill whole words.*ignore"):
        GptqFormat.check_layer(IntScheme(bits), rows, columns)


def test_symmetric_and_asymmetric_layers_are_not_mixed() -> None:
    GptqFormat.check_together([IntScheme(4), IntScheme(8, PER_CHANNEL)])
    with pytest.raises(SchemeError, match=r"zero points of all layers in one way.*same 'symmetric'"):
        GptqFormat().quantization_config({"a": IntScheme(4), "b": IntScheme(4, 64, False)})


LAYERS = {
    f"model.layers.{block}.{leaf}" for block in range(12) for leaf in ("attn.q_proj", "attn.k_proj", "mlp.down_proj")
}


def test_the_config_of_layers_that_are_alike_has_no_rules() -> None:
    layers = dict.fromkeys(LAYERS, IntScheme(4, 32, desc_act=True)) | {"lm_head": None}
    config = GptqFormat().quantization_config(layers)
    assert re.match(r"quantkit:\d", config.pop("meta")["quantizer"][0])
    assert config == {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 32, "sym": True,
        "desc_act": True, "lm_head": False, "pack_dtype": "int32",
    }  # fmt: skip
    asymmetric = GptqFormat().quantization_config({"a.0.b": IntScheme(3, PER_CHANNEL, False), "lm_head": None})
    assert (asymmetric["checkpoint_format"], asymmetric["sym"]) == ("gptq_v2", False)
    extra = GptqFormat().extra_files(layers)
    assert {name: json.loads(text) for name, text in extra.items()} == {
        "quantize_config.json": GptqFormat().quantization_config(layers)
    }


def rule_for(config: Mapping[str, Any], name: str) -> tuple[str, dict[str, Any]] | None:
    """What gptqmodel and vLLM find for a layer: the first match, from the start of its name."""
    for pattern, changes in config["dynamic"].items():
        if re.match(pattern[2:], name):
            return pattern[:2], changes
    return None


def test_rules_tell_the_layers_that_differ_by_all_their_names() -> None:
    layers: dict[str, IntScheme | None] = dict.fromkeys(sorted(LAYERS), IntScheme(4, 32))
    layers |= {"model.layers.1.mlp.down_proj": None, "model.layers.2.mlp.down_proj": IntScheme(8, PER_CHANNEL)}
    layers |= {f"model.layers.1.attn.{leaf}": IntScheme(4, 64) for leaf in ("q_proj", "k_proj")}
    config = GptqFormat().quantization_config(layers | {"lm_head": IntScheme(4, 32)})
    assert config["lm_head"] is True
    assert rule_for(config, "model.layers.1.mlp.down_proj") == ("-:", {})
    assert rule_for(config, "model.layers.2.mlp.down_proj") == ("+:", {"bits": 8, "group_size": -1})
    for leaf in ("q_proj", "k_proj", "qkv_proj"):  # the last is what vLLM makes of them
        assert rule_for(config, f"model.layers.1.attn.{leaf}") == ("+:", {"group_size": 64})
    for name in ("model.layers.11.mlp.down_proj", "model.layers.10.attn.q_proj", "model.layers.2.mlp.down_proj2"):
        assert rule_for(config, name) is None
    (packed,) = config["modules_in_block_to_quantize"]
    assert set(packed) == {name for name, scheme in layers.items() if scheme} | {"lm_head"}


def test_transformers_gets_what_it_loads() -> None:
    assert GptqFormat.computes_in([IntScheme(4, 128)]) == ("float32", "float16", "bfloat16")
    assert GptqFormat.computes_in([IntScheme(4), IntScheme(8)]) == ()
    assert GptqFormat.computes_in([IntScheme(4, 24)]) == ()
    assert FORMATS.get("gptq").requires == ("gptqmodel", "optimum")


def test_the_remarks_say_who_does_not_load_it() -> None:
    assert GptqFormat().remarks([IntScheme(4, 128)]) == ()
    assert GptqFormat().remarks([IntScheme(8, PER_CHANNEL)]) == ()
    for scheme, what in (
        (IntScheme(4, 64, False), "gptq_v2"),
        (IntScheme(3), "2 and 3 bits"),
        (IntScheme(4, desc_act=True), "desc_act"),
        (IntScheme(4, 24), "groups of 24: gptqmodel loads 16, 32, 64"),
    ):
        (remark,) = GptqFormat().remarks([scheme])
        assert what in remark
    assert "does not read 'dynamic'" in GptqFormat().remarks([IntScheme(4), IntScheme(8)])[0]


CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}


def foreign(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, QuantizedWeight], **changes: torch.Tensor | None
) -> Path:
    """A checkpoint as another tool would write it; tensors that change are replaced, or left out for None."""
    less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    tensors: dict[str, torch.Tensor] = {"norm.weight": torch.ones(4)}
    for layer, weight in weights.items():
        packed = {**GptqFormat(less=less).pack(weight), **changes}
        tensors |= {f"{layer}.{name}": tensor.contiguous() for name, tensor in packed.items() if tensor is not None}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "float16", "quantization_config": dict(config)}))
    return folder


@pytest.mark.parametrize("checkpoint_format", [None, "gptq", "gptq_v2"])
@pytest.mark.parametrize("scheme", all_schemes(), ids=names)
def test_files_of_other_tools_are_read(scheme: IntScheme, checkpoint_format: str | None, tmp_path: Path) -> None:
    """With zero points of 0; what ``g_idx`` says holds, whatever the config says of ``desc_act``."""
    weight = random_weight(scheme, ROWS, COLUMNS)
    config = CONFIG | {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}
    config |= {"checkpoint_format": checkpoint_format, "desc_act": True}
    export = open_export(foreign(tmp_path, config, {"model.layers.0.a": weight}))
    assert (export.format, dict(export.schemes)) == ("gptq", {"model.layers.0.a": scheme})
    assert_same(export.weight("model.layers.0.a"), weight)
    assert export.shape("model.layers.0.a") == (ROWS, COLUMNS)
    assert export.float_names() == ["norm.weight"]


def test_rules_of_other_tools_are_read(tmp_path: Path) -> None:
    """gptqmodel puts those that keep layers float first; then the first that matches the start of a name holds."""
    schemes = {
        "model.layers.0.a": IntScheme(4, 16),
        "model.layers.1.a": IntScheme(8, 32),
        "model.layers.1.b": IntScheme(8, PER_CHANNEL, False),
        "lm_head": IntScheme(4, 16),
    }
    dynamic = {
        r".*\.1\.b": {"bits": 8, "group_size": -1, "sym": False},
        r"+:.*\.1\.": {"bits": 8, "group_size": 32},
        r"layers": {"bits": 2},
        r"-:.*\.2\.": {},
    }
    weights = {layer: random_weight(scheme, ROWS, COLUMNS) for layer, scheme in schemes.items()}
    export = open_export(foreign(tmp_path, CONFIG | {"dynamic": dynamic, "lm_head": True}, weights))
    assert dict(export.schemes) == schemes
    for layer, weight in weights.items():
        assert_same(export.weight(layer), weight)


def test_without_g_idx_groups_are_neighbours(tmp_path: Path) -> None:
    weight = random_weight(IntScheme(4, 16), ROWS, COLUMNS)
    reader = CheckpointReader(foreign(tmp_path, CONFIG, {"a": weight}, g_idx=None))
    assert GptqFormat.schemes_in(CONFIG, reader) == {"a": weight.scheme}
    tensors = {suffix: reader.read(f"a.{suffix}") for suffix in SUFFIXES - set(GptqFormat.optional_suffixes)}
    assert_same(GptqFormat.for_config(CONFIG, "float16").unpack(tensors, weight.scheme), weight)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bits": 5}, "layer a has 5 bits.*2, 3, 4 and 8"),
        ({"bits": "4"}, "bits '4'"),
        ({"group_size": None}, "group_size None"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": 24}, "groups of 24 do not divide"),
        ({"group_size": 32}, r"qzeros has shape \[4, 4\].*\[2, 4\]"),
        ({"bits": 8}, r"qzeros has shape \[4, 4\].*\[2, 8\]"),
        ({"checkpoint_format": "marlin"}, "'marlin' is laid out for one kind of kernel"),
        ({"is_marlin_format": True}, "'marlin' is laid out for one kind of kernel"),
        ({"pack_dtype": "int16"}, "packed into int16"),
        ({"rotation": "hadamard"}, "'rotation' rotates inputs"),
        ({"dynamic": {"-:a": {}}}, "layer a is packed, and 'dynamic' keeps it float"),
        ({"dynamic": {"(": {}}}, r"'\(' in 'dynamic' is no regular expression"),
        ({"dynamic": {"a": 4}}, "'a' in 'dynamic' of quantization_config is not a mapping"),
        ({"dynamic": ["a"]}, "'dynamic' of quantization_config is not a mapping"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    folder = foreign(tmp_path, CONFIG | changes, {"a": random_weight(IntScheme(4, 16), ROWS, COLUMNS)})
    with pytest.raises(CheckpointError, match=problem):
        open_export(folder)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scales": None}, "layer a .* has no tensor 'scales'"),
        ({"qweight": None}, "no tensor is called qweight"),
        ({"qweight": torch.zeros(2, 8, 32, dtype=torch.int32)}, r"\[2, 8, 32\] and is no matrix"),
        ({"qweight": torch.zeros(8, 32)}, "a.qweight is float32, not int32"),
        ({"scales": torch.zeros(4, 31, dtype=torch.float16)}, r"a.scales has shape \[4, 31\]"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "g_idx of layer a does not have 16 columns in each group"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"a.g_idx has shape \[63\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    changes: dict[str, torch.Tensor | None], problem: str, tmp_path: Path
) -> None:
    folder = foreign(tmp_path, CONFIG, {"a": random_weight(IntScheme(4, 16), ROWS, COLUMNS)}, **changes)
    with pytest.raises(CheckpointError, match=problem):
        open_export(folder)


def test_a_symmetric_layer_with_other_zero_points_is_refused(tmp_path: Path) -> None:
    """Servers that take it for symmetric would not look at them, and others would."""
    weight = random_weight(IntScheme(4, 16, False), ROWS, COLUMNS)
    export = open_export(foreign(tmp_path, CONFIG, {"a": weight}))
    with pytest.raises(CheckpointError, match="symmetric 4-bit layer has zero points that are not 8"):
        export.weight("a")


@pytest.mark.parametrize(
    "keys",
    [
        {"bits": 4, "desc_act": True, "overrides": {"down_proj": {"bits": 8, "desc_act": False}}},
        {"bits": 3, "symmetric": False},
    ],
    ids=str,
)
def test_an_exported_model_reads_the_same_without_its_manifest(tmp_path: Path, keys: dict[str, Any]) -> None:
    """Its config alone tells as much, and the packed layers are near the float ones."""
    source = make_model(tmp_path / "source")
    spec = parse_section(VariantSpec, {"name": "v", "method": "gptq", "format": "gptq", "group_size": 32, **keys}, "v")
    facts = {"reference": "tiny", "relative_to": "the float model", "dtype": "float32"}
    folder = quantize(Job(source, facts, "float32", rows=tiny_rows(), device="cpu"), spec, tmp_path / "out").folder
    assert json.loads((folder / "quantize_config.json").read_text())["bits"] == keys["bits"]
    ours = open_export(folder)
    weights = {layer: ours.weight(layer) for layer in ours.schemes}
    (folder / "manifest.json").unlink()
    theirs = open_export(folder)
    assert theirs.schemes == ours.schemes
    assert theirs.made_by.startswith("quantkit")
    floats = load_file(source / "model.safetensors")
    for layer, weight in weights.items():
        assert_same(theirs.weight(layer), weight)
        wanted = floats[f"{layer}.weight"]
        assert (weight.dequantize(torch.float32) - wanted).norm() < 0.25 * wanted.norm()
