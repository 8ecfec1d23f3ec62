"""Sources that lie quantized: decoded as their authors' and transformers' own code decodes them, or refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError, OutputError, SourceError
from quantkit.exports import open_export
from quantkit.inspection import inspect_tables
from quantkit.pipeline import run
from quantkit.recipe import ModelSpec
from quantkit.source import SourceModel, resolve
from tests.architectures import make
from tests.runs import Notebook, make_recipe, score_here
from tests.stored_models import E4M3, as_deepseek, as_mxfp4, tensors_of, write
from tests.tiny import make_model, tiny_tokenizer


def resolved(source: Path, work: Path, **spec: Any) -> SourceModel:
    return resolve(ModelSpec(source=str(source), **spec), work)


@pytest.mark.parametrize("exponents", [False, True])
def test_blocks_of_8_bit_floats_are_decoded_and_marked(tmp_path: Path, exponents: bool) -> None:
    folder = make_model(tmp_path / "model", intermediate_size=72)
    wanted = as_deepseek(folder, 32, exponents)
    source = resolved(folder, tmp_path / "work")
    assert (source.kind, source.dtype, source.decoded) == ("folder", "bfloat16", "fp8")
    assert source.relative_to == "the dequantized source"
    found = tensors_of(source.folder)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    config = json.loads((source.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert source.made_from()["decoded"] == "fp8"
    assert AutoModelForCausalLM.from_pretrained(source.folder).dtype == torch.bfloat16


def test_what_lies_beside_the_weights_goes_along(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    as_deepseek(folder, 32)
    for name in ("preprocessor_config.json", "LICENSE"):
        (folder / name).write_text("{}")
    source = resolved(folder, tmp_path / "work")
    assert {"preprocessor_config.json", "LICENSE", "tokenizer.json"} <= {file.name for file in source.folder.iterdir()}


def test_a_disk_without_room_for_the_float_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model")
    as_deepseek(folder, 32)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"the float model takes .*, and .* has 1000 B free"):
        resolved(folder, tmp_path / "work")
    assert not (tmp_path / "work" / "source").exists()


def test_what_is_decoded_can_have_another_dtype(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    as_deepseek(folder, 32)
    source = resolved(folder, tmp_path / "work", dtype="float32")
    codes = CheckpointReader(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    scales = codes.read(f"{name}_scale_inv").repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(tensors_of(source.folder)[name], codes.read(name).float() * scales)
    assert all(tensor.dtype == torch.float32 for tensor in tensors_of(source.folder).values())


def test_a_report_says_what_its_losses_are_relative_to(
    tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.evaluation.stage.run_job", score_here)
    folder = make_model(tmp_path / "model")
    as_deepseek(folder, 32)
    variants = [{"name": "int8", "method": "rtn", "bits": 8}]
    content = run(make_recipe(folder, records, tmp_path / "run", variants), Notebook())
    assert content["source"]["decoded"] == "fp8"
    assert content["variants"][0]["metrics"]["kl_divergence"]["prose"]["mean"] > 0
    text = (tmp_path / "run" / "report.md").read_text()
    assert "All losses are relative to the dequantized source." in text
    assert re.search(r"Decoded from.*fp8", text)


def test_even_blocks_decode_as_transformers_does(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    as_deepseek(folder, 32)
    reader, found = CheckpointReader(folder), tensors_of(resolved(folder, tmp_path / "work").folder)
    own = Fp8Dequantize(None)
    for name in reader.names():
        if f"{name}_scale_inv" in reader:
            ours = own._dequantize_one(reader.read(name), reader.read(f"{name}_scale_inv"), torch.bfloat16)
            assert torch.equal(found[name], ours)


def as_channels(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = tensor.float().abs().amax(-1, keepdim=True) / 448
    return (tensor / scales).to(E4M3), scales


def as_tensor(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = tensor.float().abs().amax() / 448
    return (tensor / scale).to(E4M3), scale


@pytest.mark.parametrize(
    ("quantization", "suffix", "store", "further"),
    [
        ({"quant_method": "fbgemm_fp8"}, "weight_scale", as_channels, {}),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", as_tensor, {"input_scale": 3.0}),
        ({"quant_method": "fp8"}, "weight_scale_inv", as_tensor, {"activation_scale": 3.0}),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "weight_scale", as_tensor, {"input_scale": 3.0}),
        (None, "weight_scale", as_channels, {}),
    ],
)
def test_scales_by_channel_and_by_tensor(
    tmp_path: Path, quantization: dict[str, Any] | None, suffix: str, store: Any, further: dict[str, float]
) -> None:
    folder = make_model(tmp_path / "model")
    stored, wanted = {}, {}
    for name, tensor in tensors_of(folder).items():
        wanted[name] = stored[name] = tensor
        if name.endswith("proj.weight"):
            layer = name.removesuffix("weight")
            stored[name], stored[f"{layer}{suffix}"] = store(tensor)
            stored |= {f"{layer}{key}": torch.tensor(value) for key, value in further.items()}
            wanted[name] = (stored[name].float() * stored[f"{layer}{suffix}"]).bfloat16()
    write(folder, stored, quantization)
    found = tensors_of(resolved(folder, tmp_path / "work").folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_stacks_of_experts_are_decoded_expert_by_expert(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    draw = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 64, 96, generator=draw).to(E4M3)
    scales = torch.rand(3, 2, 3, generator=draw)
    packed = torch.randint(-128, 128, (64, 32), generator=draw, dtype=torch.int8)
    exponents = torch.randint(120, 130, (64, 2), generator=draw, dtype=torch.uint8)
    stored = {
        "experts.gate_up_proj": codes,
        "experts.gate_up_proj_scale_inv": scales,
        "experts.down_proj": codes,
        "experts.down_proj_scale_inv": torch.rand(3, generator=draw),
        "experts.0.w1.weight": packed,
        "experts.0.w1.scale": exponents.view(torch.float8_e8m0fnu),
    }
    write(folder, tensors_of(folder) | stored, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    found = tensors_of(resolved(folder, tmp_path / "work").folder)
    spread = scales.repeat_interleave(32, 1).repeat_interleave(32, 2)
    assert torch.equal(found["experts.gate_up_proj"], (codes.float() * spread).bfloat16())
    by_expert = stored["experts.down_proj_scale_inv"].view(3, 1, 1)
    assert torch.equal(found["experts.down_proj"], (codes.float() * by_expert).bfloat16())
    own = Fp8Dequantize(None)._dequantize_one(packed, exponents.view(torch.float8_e8m0fnu), torch.bfloat16)
    assert torch.equal(found["experts.0.w1.weight"], own)


def test_what_is_published_in_fewer_bits_is_inspected(tmp_path: Path) -> None:
    blocks = make_model(tmp_path / "blocks", hidden_size=128, intermediate_size=288)
    as_deepseek(blocks, 32, exponents=False)
    found = quantkit.inspect(blocks)
    layer = next(each for each in found["layers"] if each["name"] == "model.layers.1.mlp.down_proj")
    assert (found["kind"], found["format"]) == ("quantized", "fp8, as published")
    assert (layer["scheme"], layer["shape"]) == ("fp8 (e4m3fn) block 32x32", [128, 288])
    assert 8 < found["bits_per_weight"] < 8.1
    assert any("convert --to float" in line for line in found["remarks"])
    assert list(inspect_tables(found))
    experts = tmp_path / "experts"
    make(experts, "gpt_oss")
    as_mxfp4(experts)
    assert {each["scheme"] for each in quantkit.inspect(experts)["layers"]} == {"mxfp4"}
    assert quantkit.inspect(experts)["bits_per_weight"] == 4.25
    tiny_tokenizer().save_pretrained(experts)
    converted = quantkit.convert(experts, "float", out=tmp_path / "out")
    assert (converted["decoded"], converted["dtype"]) == ("mxfp4", "bfloat16")


def test_scales_that_do_not_fit_name_the_tensor(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    as_deepseek(folder, 32)
    held = tensors_of(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    quantization = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    write(folder, held | {f"{name}_scale_inv": torch.ones(3, 5)}, quantization)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale_inv' has the shape \[3, 5\]"):
        resolved(folder, tmp_path / "work")
    write(folder, {key: each for key, each in held.items() if key != f"{name}_scale_inv"}, quantization)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' is of 8-bit floats and has no scales"):
        resolved(folder, tmp_path / "work")


def test_experts_in_mxfp4_decode_bit_by_bit_as_transformers_does(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make(folder, "gpt_oss")
    tiny_tokenizer().save_pretrained(folder)
    wanted = as_mxfp4(folder)
    source = resolved(folder, tmp_path / "work")
    found = tensors_of(source.folder)
    assert (source.decoded, source.relative_to) == ("mxfp4", "the dequantized source")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(name.endswith("experts.gate_up_proj") for name in found)
    out = quantkit.quantize(folder, out=tmp_path / "out", method="rtn", group_size=32)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["source"]["relative_to"] == "the dequantized source"
    assert manifest["source"]["decoded"] == "mxfp4"
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    assert any(".experts." in layer for layer in manifest["layers"])


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("gptq", {}),
        ("awq", {"symmetric": False}),
        ("compressed-tensors", {}),
        ("bitsandbytes", {"scheme": "nf4", "group_size": 64, "bits": None}),
    ],
)
def test_what_a_tool_quantized_is_decoded_on_request_alone(tmp_path: Path, form: str, options: dict[str, Any]) -> None:
    model = make_model(tmp_path / "model", dtype=torch.float16)
    keys = {key: each for key, each in ({"bits": 4, "group_size": 32} | options).items() if each is not None}
    given = quantkit.quantize(model, out=tmp_path / form, method="rtn", format=form, **keys)
    (given / "manifest.json").unlink()
    with pytest.raises(SourceError, match=rf"quantized already \(.*{form}.*\).*float model.*model\.decode: true"):
        resolved(given, tmp_path / "work")
    source = resolved(given, tmp_path / "work", decode=True)
    assert source.relative_to == "the dequantized source"
    assert source.decoded is not None
    assert source.decoded.startswith(form)
    found = tensors_of(source.folder)
    assert found.keys() == tensors_of(model).keys()
    export = open_export(given)
    for layer in export.schemes:
        assert torch.equal(found[f"{layer}.weight"], export.decodable(layer).dequantize(torch.float32).half())


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_oss", "granitemoe", "mixtral", "llava"])
def test_what_is_decoded_lies_as_transformers_reads_it(architecture: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", architecture)
    given = quantkit.quantize(tmp_path / "model", out=tmp_path / "int8", method="rtn", bits=8, group_size=32)
    (given / "manifest.json").unlink()
    source = resolved(given, tmp_path / "work", decode=True, dtype="float32")
    loaded = type(model).from_pretrained(source.folder, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert (loaded.state_dict()[name] - tensor).abs().max() <= tensor.abs().max() / 100, name
    found, held = tensors_of(source.folder), tensors_of(tmp_path / "model")
    assert {name: each.shape for name, each in found.items()} == {name: each.shape for name, each in held.items()}


def test_blocks_that_the_class_does_not_know_are_decoded_and_go_along(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make(folder, "deepseek_v3")
    held = tensors_of(folder)
    further = {name.replace("layers.1.", "layers.2."): each for name, each in held.items() if "layers.1." in name}
    further["model.layers.2.eh_proj.weight"] = torch.randn(64, 128)
    write(folder, held | further, None, num_nextn_predict_layers=1)
    wanted = as_deepseek(folder, 32)
    out = quantkit.quantize(folder, out=tmp_path / "out", method="rtn", group_size=32)
    found = tensors_of(out)
    assert len(further) > 10
    assert all(torch.equal(found[name], wanted[name]) for name in further)


def test_8_bit_floats_of_compressed_tensors_need_no_request(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype=torch.bfloat16)
    given = quantkit.quantize(model, out=tmp_path / "fp8", method="rtn", scheme="fp8", granularity="channel")
    source = resolved(given, tmp_path / "work")
    assert source.decoded == "compressed-tensors (fp8)"
    assert tensors_of(source.folder).keys() == tensors_of(model).keys()


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8", "mxfp4"])
def test_float_weights_that_a_config_calls_quantized_are_floats(tmp_path: Path, method: str) -> None:
    folder = make_model(tmp_path / "model", dtype=torch.bfloat16)
    write(folder, tensors_of(folder), {"quant_method": method, "load_in_4bit": True})
    source = resolved(folder, tmp_path / "work")
    assert (source.relative_to, source.decoded) == ("the float model", None)
    assert "quantization_config" not in json.loads((source.folder / "config.json").read_text())
    found, wanted = tensors_of(source.folder), tensors_of(folder)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_quantized_model_that_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    quantization = {"quant_method": "torchao", "quant_type": {}}
    packed = {"model.layers.0.mlp.up_proj.weight_qdata": torch.zeros(4, 4, dtype=torch.int8)}
    write(folder, tensors_of(folder) | packed, quantization, _name_or_path="unsloth/tiny-bnb-4bit")
    nvfp4 = {"x.weight": torch.zeros(4, 8, dtype=torch.uint8), "x.weight_scale": torch.ones(4, 1).to(E4M3)}
    other = make_model(tmp_path / "other")
    write(other, nvfp4, None)
    with pytest.raises(SourceError, match="holds no float model"):
        resolved(other, tmp_path / "work")
    for decode in (False, True):
        with pytest.raises(SourceError, match=r"of torchao\).*float model \(unsloth/tiny\): this format is not read"):
            resolved(folder, tmp_path / "work", decode=decode)
