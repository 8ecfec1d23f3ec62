"""Adapters where people ask for them: a variant of a recipe, the command, a score; and QA-LoRA in the file itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import quantkit
from quantkit import evaluation, pipeline
from quantkit.cli import app
from quantkit.errors import RecipeError
from quantkit.evaluation import stage as scores
from quantkit.exports import open_export
from quantkit.recipe import RecoverOptions, RecoverSpec
from quantkit.system.artifacts import read_json
from tests.runs import Notebook, make_recipe, score_here

FIRST = {"name": "int2", "method": "rtn", "bits": 2}
SHORT: dict[str, Any] = {"steps": 4, "batch_tokens": 96, "evaluations": 2}


def test_a_variant_with_an_adapter_is_scored_with_it_and_done_once(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "run_job", score_here)
    lora = {"name": "lora", "recover": "int2", "adapter": {"rank": 8, "rate": 0.05}, **SHORT}
    recipe = make_recipe(model, records, tmp_path / "run", [FIRST, lora])
    (found,) = recipe.recover_variants
    assert isinstance(found, RecoverSpec)
    rows = pipeline.run(recipe, Notebook())["variants"]
    assert [row["status"] for row in rows] == ["ok", "ok"], [row["error"] for row in rows]
    before, after = rows
    folder = Path(after["checkpoint"])
    weights = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert after["size_bytes"] == before["size_bytes"] + weights
    assert after["method"] == "rtn+adapter"
    assert read_json(folder / "adapter" / "manifest.json")["base"]["name"] == "int2"
    for text, figures in after["metrics"]["kl_divergence"].items():
        assert figures["mean"] < before["metrics"]["kl_divergence"][text]["mean"]
    again = Notebook()
    pipeline.run(recipe, again)
    assert "lora: reused the finished checkpoint" in again.notes


def test_the_command_makes_an_adapter_and_a_score_takes_it(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = quantkit.quantize(model, out=tmp_path / "int2", method="rtn", bits=2, group_size=32, device="cpu")
    given = ["recover", str(base), "--adapter", "--untrained", "--rank", "8", "--data", str(records), "--json"]
    done = CliRunner().invoke(app, [*given, "--samples", "8", "--max-length", "64", "--out", str(tmp_path / "lora")])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["error_left"] < told["error"]
    assert "steps" not in told
    monkeypatch.setattr(evaluation, "run_job", score_here)
    keys: dict[str, Any] = {"texts": [str(records)], "metrics": ["kl_divergence"], "reference": model}
    keys |= {"context_length": 32, "max_tokens": 256}
    alone, beside = (quantkit.evaluate(base, adapter=each, **keys) for each in (None, tmp_path / "lora"))
    ((name, figures),) = beside["metrics"]["kl_divergence"].items()
    assert figures["mean"] < alone["metrics"]["kl_divergence"][name]["mean"]


def test_qa_lora_trains_zero_points_alone(model: Path, records: Path, tmp_path: Path) -> None:
    base = quantkit.quantize(
        model, out=tmp_path / "hqq", method="hqq", bits=2, group_size=32, format="hqq", zeros="float", symmetric=False
    )
    data = {"dataset": str(records), "samples": 12, "max_length": 48}
    out = tmp_path / "recovered"
    found = quantkit.recover(
        base, data=data, out=out, source=model, train=["qa-lora"], learning_rate=0.05, rank=2, device="cpu", **SHORT
    )
    assert found["after"] < found["before"]
    old, new = open_export(base), open_export(out)
    assert old.size_bytes() == new.size_bytes()
    name = next(iter(old.schemes))
    one, two = old.weight(name), new.weight(name)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales, two.scales)
    moved = (one.zeros.float() - two.zeros.float()) * one.scales.float()
    values = torch.linalg.svdvals(moved)
    assert float(values[0]) > 0


def test_qa_lora_is_trained_on_frozen_codes() -> None:
    with pytest.raises(ValueError, match="leave codes, scales out of train"):
        RecoverOptions(train=("qa-lora", "scales", "codes"))


def test_a_rank_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="rank"):
        make_recipe(
            Path("m"), Path("d.jsonl"), tmp_path, [FIRST, {"name": "lora", "recover": "int2", "adapter": {"rank": 0}}]
        )
