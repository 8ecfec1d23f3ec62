"""Format float: a model that is stored in 16 bits and not quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError, QuantkitError
from quantkit.recipe import Recipe
from quantkit.system.artifacts import read_json
from tests.runs import score_here
from tests.tiny import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", dtype=torch.float32)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_every_tensor_is_the_sources_rounded_once(model: Path, tmp_path: Path, kind: str) -> None:
    out = quantkit.quantize(model, out=tmp_path / "out", method="none", scheme=kind, format="float")
    source, written = CheckpointReader(model), CheckpointReader(out)
    assert source.names() == written.names()
    dtype = getattr(torch, kind)
    for name in source.names():
        assert torch.equal(written.read(name), source.read(name).to(dtype))
    config = read_json(out / "config.json")
    assert config["dtype"] == kind
    assert "quantization_config" not in config
    loaded, found = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert loaded.dtype == dtype
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


def test_a_value_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    model = make_model(tmp_path / "llama", dtype=torch.float32)
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] = 70000.0
    changed.save_pretrained(model)
    keys: dict[str, Any] = {"method": "none", "format": "float"}
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight reaches 70000, which float16"):
        quantkit.quantize(model, out=tmp_path / "out", scheme="float16", **keys)
    assert not (tmp_path / "out").exists()
    quantkit.quantize(model, out=tmp_path / "out", scheme="bfloat16", **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "none", "scheme": "int"}, "method none chooses no codes, and int4 g64 sym has some"),
        ({"method": "gptq", "format": "float"}, "gptq and format float do not go together.*float goes with none"),
        ({"format": "compressed-tensors", "scheme": "bfloat16"}, "bfloat16"),
        ({"method": "gptq", "scheme": "bfloat16"}, "method gptq chooses codes, and bfloat16 has none"),
    ],
)
def test_only_the_three_together_make_sense(model: Path, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantkitError, match=message):
        quantkit.quantize(model, out=tmp_path / "out", **keys)


def test_it_is_a_variant_among_others(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.evaluation.stage.run_job", score_here)
    recipe = Recipe.parse(f"""
        name: float
        model: {{source: "{model}"}}
        variants:
          - {{name: sixteen, method: none, scheme: bfloat16, format: float}}
          - {{name: eight, method: rtn, bits: 8, group_size: 32}}
        evaluation: {{texts: [prose], context_length: 32, max_tokens: 128, metrics: [kl_divergence]}}
        report: {{folder: "{tmp_path / "run"}", formats: [json]}}
    """)
    report = quantkit.run(recipe)
    rows = {row["name"]: row for row in report["variants"]}
    assert [row["status"] for row in rows.values()] == ["ok", "ok"], [row["error"] for row in rows.values()]
    assert rows["sixteen"]["bits_per_weight"] == 16
    assert rows["sixteen"]["scheme"] == "bfloat16"
    assert 0 < rows["sixteen"]["metrics"]["kl_divergence"]["prose"]["mean"] < 1e-3
    planned = {row["name"]: row for row in quantkit.plan(recipe)["variants"]}
    assert planned["sixteen"]["layers"][0] == 0
