"""The commands about one checkpoint, and merge, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import quantkit
from quantkit.cli import app
from quantkit.recipe import Recipe
from tests.adapters import make_adapter
from tests.tiny import make_model


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", dtype=torch.float16)


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantkit.quantize(model, out=tmp_path_factory.mktemp("out") / "rtn", method="rtn", group_size=32)


def test_convert_says_where_and_how_exactly(checkpoint: Path, tmp_path: Path) -> None:
    done = invoke("convert", checkpoint, "--to", "gguf", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"checkpoint: {tmp_path / 'out'} (4.5 bits per weight, every weight as it was)")
    assert (tmp_path / "out" / "model-Q4_0.gguf").is_file()


def test_a_conversion_that_cannot_be_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    done = invoke("convert", checkpoint, "--to", "bitsandbytes", "--out", tmp_path / "out")
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "the bitsandbytes format does not store int4 g32 sym" in line
    assert not (tmp_path / "out").exists()


def test_inspect_prints_tables_or_json(checkpoint: Path) -> None:
    done = invoke("inspect", checkpoint)
    assert done.exit_code == 0, done.output
    assert "compressed-tensors" in done.stdout
    assert "int4 g32 sym" in done.stdout
    found = json.loads(invoke("inspect", checkpoint, "--no-deep", "--json").stdout)
    assert found["format"] == "compressed-tensors"
    assert len(found["layers"]) == 14


def test_verify_says_passed_and_how_far_off(checkpoint: Path) -> None:
    done = invoke("verify", checkpoint, "--runtime", "transformers")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("passed: transformers in float32 on cpu")
    assert "nats from the reference decoder" in done.stdout


def test_a_verdict_that_fails_exits_with_1(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = {
        "passed": False, "runtime": "vllm", "dtype": "bfloat16", "device": "cpu", "reason": "KL 3 nats",
        "figures": None,
        "tolerance": {"kl": 0.03, "top1": 0.9, "because": "bfloat16", "max_abs": None}, "generated": None,
        "traps": [{"name": "dropped tensors", "found": "one"}], "settings": {"KEY": "0"},
    }  # fmt: skip
    monkeypatch.setattr("quantkit.api.checkpoints.verify", lambda *_, **__: verdict)
    done = invoke("verify", checkpoint, "--runtime", "vllm")
    assert done.exit_code == 1
    assert "FAILED: vllm in bfloat16 on cpu" in done.stdout
    for words in ("reason     KL 3 nats", "trap       dropped tensors: one", "settings   KEY=0"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "nowhere"),
        (["verify", "nowhere", "--runtime", "transformers"], "nowhere"),
        (["convert", "nowhere", "--to", "gguf", "--out", "out"], "there is no file or folder nowhere"),
        (["push", "nowhere", "org/name"], "nowhere"),
        (["merge", "nowhere", "adapter", "out"], "nowhere"),
        (["merge", "nowhere", "adapter", "out", "--with", "b=much"], "'much' is no weight"),
        (["import-recipe", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_runtime_is_named_with_the_nearest(checkpoint: Path) -> None:
    done = invoke("verify", checkpoint, "--runtime", "llama")
    assert done.exit_code == 2
    assert "unknown runtime 'llama' (did you mean 'llama.cpp'?" in done.stderr


def test_runtimes_and_matrix_are_listed() -> None:
    listed = invoke("runtimes").stdout
    for name in ("transformers", "llama.cpp", "vllm", "reference"):
        assert f"{name}: " in listed
    assert "here          yes" in listed
    found = json.loads(invoke("matrix", "--json").stdout)
    assert {"methods", "runtimes", "rows", "versions"} <= set(found)
    assert "int4 g32 sym" in invoke("matrix").stdout


def test_merge_makes_a_model_that_can_be_quantized(model: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", model)
    done = invoke("merge", model, tmp_path / "adapter", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"merged: {tmp_path / 'merged'}\n"
    keys: dict[str, Any] = {"method": "rtn", "group_size": 32}
    assert (quantkit.quantize(tmp_path / "merged", out=tmp_path / "out", **keys) / "model.safetensors").is_file()


def test_import_recipe_prints_a_recipe(tmp_path: Path) -> None:
    config = tmp_path / "export.yaml"
    config.write_text(
        "model_name_or_path: org/base\nadapter_name_or_path: saves/lora\ntemplate: llama3\nexport_dir: out\n"
        "export_quantization_bit: 4\nexport_quantization_dataset: data/c4.jsonl\n"
    )
    done = invoke("import-recipe", config)
    assert done.exit_code == 0, done.output
    recipe = Recipe.parse(done.stdout)
    assert recipe.model.source == "org/base"
    assert [adapter.source for adapter in recipe.model.adapter] == ["saves/lora"]
    assert recipe.own_variants[0].base_scheme().bits == 4


def test_estimate_prints_lines_what_fits_and_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    told = invoke("estimate", "llama-2-7b", "--bits", "4", "--group-size", "128", "--train")
    assert told.exit_code == 0, told.output
    assert "int4 g128 sym" in told.stdout
    found = json.loads(invoke("estimate", "llama-2-7b", "--json").stdout)
    assert found["parts"]
    small, large = (
        json.loads(invoke("estimate", "llama-2-7b", "--fits", size, "--json").stdout) for size in ("4GiB", "80GiB")
    )
    assert sum(way["fits"] for way in small) < sum(way["fits"] for way in large)
    monkeypatch.setenv("COLUMNS", "80")
    for asked in (("--fits", "8GiB"), ("--cards",)):
        table = invoke("estimate", "llama-3-8b", *asked).stdout
        assert max(map(len, table.splitlines())) <= 80
        assert "…" not in table
        assert "8,192" in table
        assert "compressed-tensors" in table
    assert "H100 80 GB" in table
    refused = invoke("estimate", "llama-2-7b", "--fits", "much")
    assert refused.exit_code == 2
    assert "much" in refused.stderr
