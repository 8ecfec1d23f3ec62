"""Inspecting checkpoints: figures that the tensors bear out, traps and faults by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.exports import open_export
from quantkit.inspection import inspect, inspect_tables
from quantkit.inspection.problems import architecture_problems
from quantkit.system.artifacts import read_json, write_json
from quantkit.system.distribution import own_version
from tests.tiny import make_model

DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16)


def exported(model: Path, out: Path, **keys: Any) -> Path:
    keys = {"method": "rtn", "bits": 4, "group_size": 32, **keys}
    return quantkit.quantize(model, out=out, **keys)


def layer(found: dict[str, Any], name: str = DOWN) -> dict[str, Any]:
    return next(each for each in found["layers"] if each["name"] == name)


def printed(found: dict[str, Any], width: int = 200) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    for each in inspect_tables(found):
        console.print(each)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_no_figure_is_cut_in_a_narrow_terminal(model: Path, tmp_path: Path) -> None:
    found = inspect(exported(model, tmp_path / "out"))
    shown = printed(found, 80)
    assert max(map(len, shown.splitlines())) <= 80
    words = shown.split()
    for layer in found["layers"]:
        assert f"{layer['outliers']:.2e}" in words
        assert f"{layer['bits_per_weight']:.3f}" in words
        assert f"{layer['at_ends']:.2%}" in words


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_sizes_and_bits_are_those_of_the_tensors(model: Path, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "out", overrides={"down_proj": {"bits": 8}})
    found = inspect(folder)
    assert found == json.loads(json.dumps(found, allow_nan=False))
    assert (found["kind"], found["format"], found["made_by"]) == (
        "quantized",
        "compressed-tensors",
        f"quantkit {own_version()}",
    )
    reader = CheckpointReader(folder)
    packed = [name for name in reader.names() if "_proj" in name]
    stored, weights = sum(map(reader.nbytes, packed)), found["quantized_weights"]
    assert found["bits_per_weight"] == pytest.approx(stored * 8 / weights)
    assert found["bytes"] == (folder / "model.safetensors").stat().st_size
    original = CheckpointReader(model)
    assert found["parameters"] == sum(torch.Size(original.shape(name)).numel() for name in original.names())
    assert {name: each["layers"] for name, each in found["schemes"].items()} == {"int4 g32 sym": 12, "int8 g32 sym": 2}
    assert sum(each["bytes"] for each in found["schemes"].values()) == stored
    assert {each["name"] for each in found["floats"]} == set(reader.names()) - set(packed)
    assert found["float_dtypes"]["bfloat16"]["tensors"] == len(found["floats"])
    facts = layer(found)
    assert (facts["shape"], facts["bits"], facts["group_size"]) == ([64, 128], 8, 32)
    assert found["problems"] == []


def test_outliers_codes_and_scales_are_those_of_the_decoded_layer(model: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", dtype=torch.bfloat16)

    def spike(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{DOWN}.weight"][3, 5] = 4.0
        tensors[f"{DOWN}.weight"][7, 9] = -3.0

    edit_tensors(source, spike)
    folder = exported(source, tmp_path / "out", range="minmax")
    facts = layer(inspect(folder))
    weight = open_export(folder).weight(DOWN)
    values = weight.dequantize(torch.float32)
    assert facts["outliers"] == 2 / values.numel()
    assert facts["largest"] == pytest.approx(float(values.abs().max() / values.std(correction=0)), rel=1e-5)
    ends = (weight.codes == 0) | (weight.codes == 15)
    assert facts["at_ends"] == pytest.approx(float(ends.float().mean()))
    assert facts["scales"] == {"count": weight.scales.numel(), "zero": 0, "denormal": 0, "non_finite": 0}


@pytest.mark.parametrize(
    ("keys", "ends"),
    [
        ({"scheme": "mxfp4"}, (7, 15)),
        ({"scheme": "nf4", "format": "bitsandbytes", "group_size": 64}, (0, 15)),
        ({"scheme": "fp8"}, (0x7E, 0xFE)),
    ],
)
def test_the_ends_of_a_grid_are_those_of_its_table(
    keys: dict[str, Any], ends: tuple[int, int], model: Path, tmp_path: Path
) -> None:
    keys = {"bits": None, **keys}
    if keys["scheme"] != "nf4":
        keys["group_size"] = None
    given = {name: value for name, value in {"method": "rtn", **keys}.items() if value is not None}
    folder = quantkit.quantize(model, out=tmp_path / "out", **given)
    codes = open_export(folder).weight(DOWN).codes
    expected = float(((codes == ends[0]) | (codes == ends[1])).float().mean())
    assert layer(inspect(folder))["at_ends"] == pytest.approx(expected)
    assert expected > 0


@pytest.mark.parametrize(
    "keys",
    [
        {"bits": 4, "group_size": 32},
        {"bits": 4, "group_size": 32, "format": "hqq"},
        {"scheme": "nf4", "format": "bitsandbytes"},
    ],
    ids=["compressed-tensors", "hqq", "bitsandbytes"],
)
def test_only_headers_are_read_where_nothing_is_to_be_decoded(
    keys: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantkit.quantize(model, out=tmp_path / "out", method="rtn", **keys)
    deep = inspect(folder)
    read: list[int] = []
    original = CheckpointReader.read

    def watched(self: CheckpointReader, name: str) -> torch.Tensor:
        read.append(self.nbytes(name))
        return original(self, name)

    monkeypatch.setattr(CheckpointReader, "read", watched)
    shallow = inspect(folder, deep=False)
    assert max(read, default=0) < 300
    assert [each["shape"] for each in shallow["layers"]] == [each["shape"] for each in deep["layers"]]
    assert shallow["bits_per_weight"] == deep["bits_per_weight"]
    assert "outliers" not in shallow["layers"][0]
    assert DOWN in printed(shallow)


def test_bad_scales_are_problems(model: Path, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "out")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        scales = tensors[f"{DOWN}.weight_scale"]
        scales[0, 0], scales[0, 1], scales[1, 0], scales[2, 0] = torch.inf, torch.nan, 0.0, 1e-39
        tensors[f"{UP}.weight_scale"].zero_()

    edit_tensors(folder, spoil)
    found = inspect(folder)
    assert layer(found)["scales"] == {"count": 64 * 4, "zero": 1, "denormal": 1, "non_finite": 2}
    assert sorted(found["problems"]) == [
        f"{DOWN}: 2 of 256 scales are not finite",
        f"{UP}: all its weights are the same number",
    ]
    json.dumps(found, allow_nan=False)
    assert "4 of 256" in printed(found)


def test_fused_layers_of_different_schemes_are_a_trap(model: Path, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "out")
    manifest = read_json(folder / "manifest.json")
    name = "model.layers.0.self_attn.k_proj"
    original = CheckpointReader(model).read(f"{name}.weight")
    del manifest["layers"][name]

    def back_to_float(tensors: dict[str, torch.Tensor]) -> None:
        for each in [each for each in tensors if name in each]:
            del tensors[each]
        tensors[f"{name}.weight"] = original

    edit_tensors(folder, back_to_float)
    write_json(folder / "manifest.json", manifest)
    (problem,) = inspect(folder)["problems"]
    assert problem.startswith("model.layers.0.self_attn: q_proj is int4 g32 sym, k_proj is float, v_proj is int4")


def test_missing_unknown_and_leftover_tensors_are_named(model: Path, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "out")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("model.norm.weight")
        tensors["model.stray"] = torch.ones(2)
        tensors["model.layers.0.mlp.other.weight_scale"] = torch.ones(2)
        tensors[f"{DOWN}.weight"] = torch.ones(64, 128)

    edit_tensors(folder, spoil)
    problems = "\n".join(inspect(folder)["problems"])
    assert "model.norm.weight: tensors that the model needs and the checkpoint lacks" in problems
    assert "other.weight_scale: parts of a packed layer that is not whole" in problems
    assert f"{DOWN}.weight: stored as float beside the packed layer" in problems
    assert "model.stray: tensors that the model does not know" in problems
    assert "model.stray" in printed(inspect(folder))


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", tie_word_embeddings=True)
    assert inspect(exported(source, tmp_path / "out"))["problems"] == []
    assert inspect(source)["problems"] == []


def test_a_float_checkpoint_is_described_as_such(model: Path) -> None:
    found = inspect(model)
    assert (found["kind"], found["format"], found["bits_per_weight"]) == ("float", "float", None)
    assert found["made_by"].startswith("transformers ")
    assert found["parameters"] == found["float_dtypes"]["bfloat16"]["parameters"]
    assert found["layers"] == found["problems"] == []
    assert "float" in printed(found)


def test_what_loads_it_is_said(model: Path, tmp_path: Path) -> None:
    asymmetric = inspect(exported(model, tmp_path / "a", symmetric=False), deep=False)
    assert asymmetric["loads"][:2] == ["transformers with compressed-tensors", "vLLM"]
    assert any(remark.startswith("asymmetric: ") for remark in asymmetric["remarks"])
    wide = quantkit.quantize(
        make_model(tmp_path / "wide"), out=tmp_path / "m", method="rtn", scheme="mxfp4", dtype="own"
    )
    assert inspect(wide, deep=False)["loads"][0].endswith("in bfloat16 (the checkpoint is float32)")
    text = printed(asymmetric)
    assert "Loads it" in text
    assert "asymmetric: vLLM" in text


def test_a_gguf_file_is_inspected_like_a_folder(model: Path, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "out", format="gguf")
    (file,) = folder.glob("*.gguf")
    for path in (folder, file):
        found = inspect(path)
        assert (found["kind"], found["format"]) == ("quantized", "gguf")
        assert found["loads"][0] == "llama.cpp"
        assert found["problems"] == []
        assert layer(found)["shape"] == [64, 128]


def test_markup_in_names_is_printed_as_it_is(model: Path) -> None:
    found = inspect(model, deep=False) | {"problems": ["[red]tensor[/] [bold"], "path": "[b]x[/b]"}
    text = printed(found)
    assert "[red]tensor[/] [bold" in text
    assert "[b]x[/b]" in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none", "there is no checkpoint"),
        (lambda folder: folder, "config.json cannot be read"),
        (lambda folder: _file(folder / "x.gguf", b"not gguf"), "x.gguf"),
        (lambda folder: _file(folder / "notes.txt", b"text"), "notes.txt"),
        (lambda folder: _file(folder / "config.json", b"[]").parent, "is not a mapping"),
        (lambda folder: _file(folder / "config.json", b'{"quantization_config": 1}').parent, "no safetensors"),
        (lambda folder: _file(folder / "config.json", b"{}").parent, "no safetensors"),
    ],
)
def test_bad_paths_are_one_line(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=message) as caught:
        inspect(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_unknown_format_is_one_line_with_those_that_are_read(model: Path, tmp_path: Path) -> None:
    folder = exported(model, tmp_path / "out")
    (folder / "manifest.json").unlink()
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "quantization_config": {"quant_method": "quip"}})
    with pytest.raises(CheckpointError, match=r"quantized with 'quip'.*compressed-tensors"):
        inspect(folder)


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_numbers_that_json_has_no_word_for_are_understood_in_configs() -> None:
    config = {
        "architectures": ["Mamba2ForCausalLM"], "num_hidden_layers": 1, "hidden_size": 32, "num_heads": 4,
        "head_dim": 16, "state_size": 8, "vocab_size": 8, "n_groups": 1,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }  # fmt: skip
    (problem,) = architecture_problems(config, set(), set())
    assert problem.endswith("tensors that the model needs and the checkpoint lacks")
