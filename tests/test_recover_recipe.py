"""Recovery where people ask for it: a variant of a recipe that names another one, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import quantkit
from quantkit import pipeline
from quantkit.cli import app
from quantkit.errors import CheckpointError, RecipeError
from quantkit.evaluation import stage as scores
from quantkit.pipeline.plan import forecast
from quantkit.pipeline.recovering import source_of
from quantkit.recipe import Recipe, RecoverOptions, RecoverSpec
from quantkit.system.artifacts import read_json
from tests.runs import Notebook, make_recipe, score_here, write_records
from tests.tiny import make_model

FIRST = {"name": "int2", "method": "rtn", "bits": 2}
THEN = {"name": "better", "recover": "int2", "steps": 6, "batch_tokens": 96, "evaluations": 2, "code_rate": 0.03}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "instructions.jsonl")


def recipe_of(tmp_path: Path, *variants: dict[str, Any], **changes: Any) -> Recipe:
    return make_recipe(Path("./model"), Path("instructions.jsonl"), tmp_path / "run", list(variants), **changes)


def test_a_variant_names_one_that_comes_before_it(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, FIRST, THEN)
    (found,) = recipe.recover_variants
    assert isinstance(found, RecoverSpec)
    assert found.options == RecoverOptions(steps=6, batch_tokens=96, evaluations=2, code_rate=0.03)
    assert Recipe.parse(recipe.to_yaml()).recover_variants == recipe.recover_variants
    for variants in ([THEN, FIRST], [FIRST, {**THEN, "recover": "int3"}], [FIRST, {**THEN, "recover": "better"}]):
        with pytest.raises(RecipeError, match="comes before it"):
            recipe_of(tmp_path, *variants)


def test_keys_of_a_method_are_refused_and_defaults_of_one_left_aside(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown key.*bits"):
        recipe_of(tmp_path, FIRST, {**THEN, "bits": 3})
    with pytest.raises(RecipeError, match="rounding"):
        recipe_of(tmp_path, FIRST, {**THEN, "train": ["rounding"]})
    with pytest.raises(RecipeError, match="trained on the records alone"):
        recipe_of(tmp_path, FIRST, {**THEN, "data": {"dataset": "./instructions.jsonl", "generated": 512}})
    found = recipe_of(tmp_path, FIRST, {**THEN, "steps": 3}, defaults={"group_size": 32, "seed": 4})
    assert found.recover_variants[0].seed == 4


def test_data_of_its_own_is_looked_for_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_records(tmp_path / "mine.jsonl")
    text = recipe_of(tmp_path, FIRST, {**THEN, "data": {"dataset": "mine.jsonl"}}).to_yaml()
    (tmp_path / "demo.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path.parent)
    (found,) = Recipe.load(tmp_path / "demo.yaml").recover_variants
    assert found.data is not None
    assert found.data.dataset == str(tmp_path / "mine.jsonl")
    assert not found.calibrated


def test_a_run_has_both_as_rows_and_trains_again_only_what_changed(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "run_job", score_here)
    recipe = make_recipe(model, records, tmp_path / "run", [FIRST, THEN])
    plan = forecast(recipe)
    assert [each["state"] for each in plan["variants"]] == ["to do", "to do"]
    assert plan["variants"][0]["size_bytes"] == plan["variants"][1]["size_bytes"]
    report = pipeline.run(recipe, Notebook())
    assert [row["status"] for row in report["variants"]] == ["ok", "ok"], [row["error"] for row in report["variants"]]
    before, after = report["variants"]
    assert after["method"] == "rtn+recover"
    assert after["scheme"] == before["scheme"]
    assert after["size_bytes"] == before["size_bytes"]
    assert after["recovered"]["after"] < after["recovered"]["before"]
    assert any("recovered: divergence" in note for note in after["notes"])
    again = Notebook()
    pipeline.run(recipe, again)
    assert "better: reused the finished checkpoint" in again.notes
    assert not any(step == "step" for step, _, _ in again.steps)
    card = (Path(after["checkpoint"]) / "README.md").read_text(encoding="utf-8")
    assert "recover" in card


def test_the_original_s_failure_is_told_in_the_row(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "run_job", score_here)
    recipe = make_recipe(model, records, tmp_path / "run", [{**FIRST, "group_size": 48, "strict": True}, THEN])
    rows = pipeline.run(recipe, Notebook())["variants"]
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert "int2 failed, of which it is made" in rows[1]["error"]


def test_the_command_trains_a_checkpoint_and_finds_its_float_model(model: Path, records: Path, tmp_path: Path) -> None:
    given = quantkit.quantize(model, out=tmp_path / "int2", method="rtn", bits=2, group_size=32, device="cpu")
    assert source_of(given) == str(model)
    keys = ["--set", "batch_tokens=96", "--set", "evaluations=1", "--samples", "12", "--max-length", "48"]
    done = CliRunner().invoke(
        app,
        [
            "recover",
            str(given),
            "--out",
            str(tmp_path / "out"),
            "--data",
            str(records),
            "--steps",
            "3",
            "--json",
            *keys,
        ],
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["steps"] == 3
    assert told["checkpoint"] == str(tmp_path / "out")
    assert read_json(tmp_path / "out" / "manifest.json")["recovered"]["steps"] == 3
    stage = read_json(given / "stage.json")
    stage["made_from"]["source"]["reference"] = "/not/there"
    (given / "stage.json").write_text(json.dumps(stage), encoding="utf-8")
    with pytest.raises(CheckpointError, match="does not tell where the float model lies"):
        source_of(given)
