"""Convert whatever there is: float models to files and other dtypes, and any codes to floats, which is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.cli import app
from quantkit.errors import QuantkitError
from quantkit.exports import find_gguf, open_export
from quantkit.exports.manifest import read_manifest
from quantkit.gguf.head import read_head
from quantkit.merging import merged_source
from quantkit.pipeline.converting import convert_any
from quantkit.publishing.card import card
from quantkit.recipe import MergeSpec, ModelSpec
from quantkit.system.artifacts import read_json
from tests.runs import Notebook, write_records
from tests.tiny import make_model


@pytest.mark.parametrize(
    ("to", "dtype", "wanted"),
    [
        ("float16", "auto", torch.float16),
        ("BF16", "auto", torch.bfloat16),
        ("f32", "auto", torch.float32),
        ("float", "auto", torch.bfloat16),
        ("float", "own", torch.float32),
        ("float", "float16", torch.float16),
    ],
)
def test_a_float_model_in_another_dtype_is_rounded_once(
    tmp_path: Path, to: str, dtype: str, wanted: torch.dtype
) -> None:
    model = make_model(tmp_path / "model")
    found = quantkit.convert(model, to, out=tmp_path / "out", dtype=dtype)
    assert (found["from"], found["format"], found["dtype"]) == ("float", "float", str(wanted).removeprefix("torch."))
    source, written = CheckpointReader(model), CheckpointReader(tmp_path / "out")
    assert all(torch.equal(written.read(name), source.read(name).to(wanted)) for name in source.names())
    config = read_json(tmp_path / "out" / "config.json")
    assert config["dtype"] == found["dtype"]
    assert "decoded_from" not in config


def test_a_float_model_becomes_a_float_gguf_file(model: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["convert", str(model), "--to", "gguf", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "(float, bfloat16)" in done.stdout
    file = find_gguf(tmp_path / "out")
    assert file is not None
    assert file.name == "model-BF16.gguf"
    assert read_head(file).tensors["blk.0.ffn_up.weight"].kind.name == "BF16"
    back = quantkit.convert(file, "float", out=tmp_path / "back")
    assert back["decoded"] is None
    source, written = CheckpointReader(model), CheckpointReader(tmp_path / "back")
    assert all(torch.equal(written.read(name), source.read(name)) for name in source.names())


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"format": "gptq", "bits": 4, "group_size": 32}, "gptq (int)"),
        ({"scheme": "nf4"}, "bitsandbytes (nf4)"),
        ({"format": "gguf", "bits": 8}, "GGUF"),
        ({"scheme": "fp8", "granularity": "block"}, "compressed-tensors (fp8)"),
    ],
)
def test_codes_become_floats_and_the_export_says_so(
    model: Path, tmp_path: Path, keys: dict[str, object], told: str
) -> None:
    codes = quantkit.quantize(model, out=tmp_path / "codes", method="rtn", **keys)  # type: ignore[arg-type]
    found = quantkit.convert(codes, "float", out=tmp_path / "out")
    assert found["decoded"] == told
    config = read_json(tmp_path / "out" / "config.json")
    assert config["decoded_from"] == told
    assert "quantization_config" not in config
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest["source"]["relative_to"] == "the dequantized source"
    assert told in card(tmp_path / "out")
    export, written = open_export(codes), CheckpointReader(tmp_path / "out")
    layer = "model.layers.1.mlp.down_proj"
    decoded = export.weight(layer).dequantize(torch.float32).to(written.dtype(f"{layer}.weight"))
    assert torch.equal(written.read(f"{layer}.weight"), decoded)
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)[1]["missing_keys"]
    again = merged_source(ModelSpec(source=str(tmp_path / "out")), MergeSpec(), tmp_path / "work", Notebook())
    assert again.relative_to == "the dequantized source"


def test_what_cannot_be_is_refused_with_what_can(model: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match=r"is a float model, and format gptq holds codes .*quantize --format gptq"):
        quantkit.convert(model, "gptq", out=tmp_path / "out")
    with pytest.raises(QuantkitError, match="no file or folder"):
        quantkit.convert(tmp_path / "nothing", "gguf", out=tmp_path / "out")
    codes = quantkit.quantize(model, out=tmp_path / "codes", method="rtn", group_size=32)
    with pytest.raises(QuantkitError, match="keeps its codes"):
        quantkit.convert(codes, "gptq", out=tmp_path / "out", dtype="float16")
    with pytest.raises(QuantkitError, match=r"unknown format 'gguff'.*did you mean 'gguf'"):
        quantkit.convert(model, "gguff", out=tmp_path / "out")


def test_floats_tell_what_is_not_asked_of_runtimes_any_more(model: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"bits": 8, "group_size": -1, "activations": "dynamic", "kv_cache": "fp8"}
    records = str(write_records(tmp_path / "rows.jsonl"))
    codes = quantkit.quantize(model, out=tmp_path / "codes", method="rtn", calibration=records, **keys)
    observer = Notebook()
    found = convert_any(str(codes), "float", tmp_path / "out", observer)
    assert found["notes"] == [
        "a float model's inputs are not rounded, as those of this checkpoint are: int8 per token",
        "this format does not say how runtimes store keys and values: the scales of the KV cache are left out",
    ]
    with pytest.raises(
        QuantkitError, match=r"the gptq format does not store int8 channel sym a8 .*without activations"
    ):
        quantkit.convert(codes, "gptq", out=tmp_path / "gptq")
