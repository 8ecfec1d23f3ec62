"""Mixed variants from a recipe to its report, and by the command."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import quantkit
from quantkit import pipeline
from quantkit.allocation.table import ALLOCATION, Allocation
from quantkit.cli import app
from quantkit.errors import QuantizationError, RecipeError, SchemeError, SourceError
from quantkit.evaluation import stage as scores
from quantkit.exports.manifest import read_manifest
from quantkit.pipeline import mixing, single
from quantkit.pipeline.plan import forecast
from quantkit.recipe import Recipe
from quantkit.schemes import scheme_from_json
from tests.architectures import make
from tests.runs import Notebook, make_recipe, recipe_data, score_here, write_records
from tests.tiny import make_model

MIX: dict[str, Any] = {
    "name": "mix",
    "bits": "auto",
    "budget": [4.0, 5.0],
    "choices": ["int3", "int4", "int8", "float"],
    "method": "rtn",
    "group_size": 32,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "instructions.jsonl")


@pytest.fixture(scope="module")
def recipe(model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """Recipes of variants, all in one folder."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return lambda *variants, **changes: make_recipe(
        model, records, out, [copy.deepcopy(each) for each in variants], **changes
    )


@pytest.fixture(scope="module")
def planned(recipe: Callable[..., Recipe]) -> dict[str, Any]:
    """The plan of a run before it."""
    return forecast(recipe(MIX))


@pytest.fixture(scope="module")
def finished(planned: dict[str, Any], recipe: Callable[..., Recipe]) -> tuple[dict[str, Any], Notebook]:
    """A run of two mixes, one that nothing meets, and one that is trained from a mix."""
    notebook = Notebook()
    tight = {**MIX, "name": "tight", "budget": 2.0}
    trained = {"name": "trained", "recover": "mix-4", "steps": 2, "batch_tokens": 64, "evaluations": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "run_job", score_here)
        return pipeline.run(recipe(MIX, tight, trained), notebook), notebook


def row_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in report["variants"] if row["name"] == name)


def chosen(allocation: dict[str, Any]) -> dict[str, str]:
    """By layer the name of its choice."""
    return {layer: unit["choice"] for unit in allocation["units"] for layer in unit["layers"]}


def test_a_plan_tells_what_there_is_to_choose_and_what_it_may_take(
    planned: dict[str, Any], finished: tuple[dict[str, Any], Notebook], recipe: Callable[..., Recipe]
) -> None:
    before = planned["variants"][0]
    assert (before["scheme"], before["state"]) == ("int3 to int8, mixed", "to do")
    assert before["notes"][0] == "a choice for each of 14 layers, to be measured: int3, int4, int8, float"
    assert re.fullmatch(r"the file takes [\d.]+ KiB to [\d.]+ KiB by what is chosen", before["notes"][1])
    stages = [each["stage"] for each in planned["time"]["stages"]]
    assert stages[1:3] == ["choose bits: mix-4, mix-5", "quantize: mix-4, mix-5"]
    after = forecast(recipe(MIX))["variants"]
    assert [each["state"].split()[0] for each in after] == ["finished", "finished"]
    for each, planned_size in zip(after, [row["size_bytes"] for row in planned["variants"]], strict=True):
        real = sum(file.stat().st_size for file in checkpoint(finished[0], each["name"]).glob("*.safetensors"))
        assert 0.95 * planned_size < real <= planned_size
    assert "int3 g32 sym" in after[0]["schemes"]


def checkpoint(report: dict[str, Any], name: str) -> Path:
    return Path(row_of(report, name)["checkpoint"])


def test_each_layer_is_stored_as_was_chosen_within_the_budget(finished: tuple[dict[str, Any], Notebook]) -> None:
    report, notebook = finished
    for name, budget in (("mix-4", 4.0), ("mix-5", 5.0)):
        row = row_of(report, name)
        allocation = row["allocation"]
        assert budget - 0.3 < allocation["predicted"]["bits_per_weight"] <= budget
        assert row["bits_per_weight"] == pytest.approx(allocation["predicted"]["bits_per_weight"], abs=1e-9)
        assert (row["scheme"], row["bits"]) == ("int3 to int8, mixed", None)
        manifest = read_manifest(Path(row["checkpoint"])) or {}
        stored = {layer: f"int{scheme_from_json(each).bits}" for layer, each in manifest["layers"].items()}
        assert stored == {layer: name for layer, name in chosen(allocation).items() if name != "float"}
        assert json.loads((Path(row["checkpoint"]) / ALLOCATION).read_text(encoding="utf-8")) == allocation
        assert ALLOCATION in manifest["files"]
        assert any(
            note.startswith(f"{name}: {row['bits_per_weight']:.2f} bits per weight: ") for note in notebook.notes
        )
    wide, narrow = (row_of(report, name)["allocation"]["predicted"]["kl_divergence"] for name in ("mix-4", "mix-5"))
    assert wide > narrow > 0


def test_budgets_share_a_measurement_and_one_that_nothing_meets_is_a_row(
    finished: tuple[dict[str, Any], Notebook], recipe: Callable[..., Recipe]
) -> None:
    report, notebook = finished
    assert [title for title in notebook.stages if "choose" in title] == ["choose bits: mix-4, mix-5, tight"]
    assert len([path for path in (recipe(MIX).folder / mixing.COSTS).iterdir() if "-" not in path.name]) == 1
    tight = row_of(report, "tight")
    assert tight["status"] == "failed"
    assert re.search(r"3\.5", tight["error"]), tight["error"]
    assert [row["status"] for row in report["variants"]] == ["ok", "ok", "failed", "ok"]
    assert row_of(report, "trained")["scheme"] == "int3 to int8, mixed"


def test_a_second_run_measures_nothing_and_one_that_was_cut_short_neither(
    finished: tuple[dict[str, Any], Notebook], recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "run_job", score_here)
    monkeypatch.setattr(mixing, "measured", None)  # calling it would fail
    shutil.rmtree(checkpoint(finished[0], "mix-5"))  # as if it had been killed between choice and checkpoint
    notebook = Notebook()
    report = pipeline.run(recipe(MIX), notebook)
    assert report["status"] == "ok"
    assert "mix-4: reused the finished checkpoint" in notebook.notes
    for name in ("mix-4", "mix-5"):
        assert row_of(report, name)["allocation"] == row_of(finished[0], name)["allocation"]


def test_an_allocation_is_edited_and_given_back(
    finished: tuple[dict[str, Any], Notebook], recipe: Callable[..., Recipe], tmp_path: Path, model: Path
) -> None:
    folder = checkpoint(finished[0], "mix-4")
    data = json.loads((folder / ALLOCATION).read_text(encoding="utf-8"))
    for unit in data["units"]:
        unit["choice"] = "int8" if ".1." in unit["layers"][0] else "int3"
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(data), encoding="utf-8")
    out = quantkit.quantize(
        model, out=tmp_path / "out", bits="auto", allocation=str(edited), method="rtn", group_size=32
    )
    stored = {layer: scheme_from_json(each).bits for layer, each in (read_manifest(out) or {})["layers"].items()}
    assert stored == {layer: 8 if ".1." in layer else 3 for layer in stored}
    assert chosen(json.loads((out / ALLOCATION).read_text(encoding="utf-8"))) == chosen(data)
    given = {**MIX, "allocation": str(edited)}
    given = {key: value for key, value in given.items() if key not in ("budget", "choices")}
    (plan,) = forecast(recipe(given))["variants"]
    assert plan["schemes"] == {"int3 g32 sym": 7, "int8 g32 sym": 7}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda units: units[0].update(layers=["model.layers.7.mlp.up_proj"]), "no layer 'model.layers.7.mlp.up_proj'"),
        (lambda units: units.pop(), "has no choice for"),
        (lambda units: units[0].update(choice="int5"), "has no choice 'int5'"),
    ],
)
def test_an_allocation_that_does_not_suit_the_model_is_refused(
    finished: tuple[dict[str, Any], Notebook], recipe: Callable[..., Recipe], tmp_path: Path, change: Any, told: str
) -> None:
    data = json.loads((checkpoint(finished[0], "mix-4") / ALLOCATION).read_text(encoding="utf-8"))
    change(data["units"])
    file = tmp_path / "edited.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    (plan,) = forecast(recipe({"name": "back", "allocation": str(file), "method": "rtn", "group_size": 32}))["variants"]
    assert told in plan["state"]


def test_what_somebody_changed_in_the_folder_of_a_run_is_not_written_over(
    finished: tuple[dict[str, Any], Notebook], recipe: Callable[..., Recipe]
) -> None:
    file = recipe(MIX).folder / mixing.ALLOCATIONS / "mix-4.json"
    before = file.read_bytes()
    found = Allocation.load(file)
    found.with_choice(["int8"] * len(found.units)).save(file)
    changed = file.read_bytes()
    (first, _) = forecast(recipe(MIX))["variants"]
    assert "was changed" in first["state"]
    assert "allocation: FILE" in first["state"]
    assert file.read_bytes() == changed
    file.write_bytes(before)


def test_one_checkpoint_is_mixed_by_a_command(model: Path, records: Path, tmp_path: Path) -> None:
    out = tmp_path / "mixed"
    options = ["--bits", "auto", "--budget", "4.0", "--choices", "int3,int4,int8", "--method", "rtn"]
    given = ["quantize", str(model), "--out", str(out), *options, "--group-size", "32", "--calibration", str(records)]
    ran = CliRunner().invoke(app, [*given, "--max-length", "64", "--samples", "8"])
    assert ran.exit_code == 0, ran.output
    allocation = json.loads((out / ALLOCATION).read_text(encoding="utf-8"))
    assert allocation["predicted"]["bits_per_weight"] <= 4.0
    assert allocation["budget"] == "4 bits per weight"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed"]
    with pytest.raises(RecipeError, match="one checkpoint is made to one budget"):
        quantkit.quantize(model, out=out, bits="auto", budget=[4.0, 5.0])


def test_an_estimate_of_a_mix_keeps_to_its_budget(model: Path) -> None:
    whole = quantkit.estimate(model, bits=8).part("file").nbytes
    found = quantkit.estimate(model, bits="auto", budget=4.0, group_size=32)
    assert 3.7 < (found.stored.bits_per_weight or 0) <= 4.0
    assert found.scheme.endswith("others") or found.scheme.endswith("other")
    size = quantkit.estimate(model, bits="auto", budget=f"{whole}B", group_size=32).part("file").nbytes
    assert 0.8 * whole < size <= whole
    assert CliRunner().invoke(app, ["estimate", str(model), "--bits", "auto", "--budget", "4.0"]).exit_code == 0
    with pytest.raises(SchemeError, match="16 bits per weight is enough for every layer as it is"):
        quantkit.estimate(model, bits="auto", budget=16.0, group_size=32)


def test_a_gguf_file_with_its_embedding_is_mixed_within_its_size(model: Path, records: Path, tmp_path: Path) -> None:
    budget = 105_000
    out = quantkit.quantize(
        model,
        out=tmp_path / "out",
        format="gguf",
        method="rtn",
        bits="auto",
        budget=f"{budget}B",
        choices=["q4_0", "q5_0", "q8_0"],
        calibration={"dataset": str(records), "samples": 8, "max_length": 64},
    )
    (file,) = out.glob("model-*.gguf")
    assert 0.9 * budget < file.stat().st_size <= budget
    picked = chosen(json.loads((out / ALLOCATION).read_text(encoding="utf-8")))
    assert {"model.embed_tokens", "lm_head"} <= picked.keys()


def test_a_measurement_that_fails_is_not_tried_again_for_another_budget(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def failing(_job: Any, spec: Any, *_: Any, **_more: Any) -> None:
        tries.append(spec.name)
        raise QuantizationError("a layer cannot be solved", "give other rows")

    monkeypatch.setattr(mixing, "measured", failing)
    large = {**MIX, "name": "large", "budget": 16.0}
    report = pipeline.run(
        recipe({**MIX, "choices": ["int4", "int8", "float"], "budget": [5.0, 6.0]}, large), Notebook()
    )
    assert tries == ["mix-5"]
    errors = {row["name"]: row["error"] for row in report["variants"]}
    assert "a layer cannot be solved" in errors["mix-5"]
    assert errors["mix-6"] == errors["mix-5"]
    assert "16 bits per weight is enough for every layer as it is" in errors["large"]


def test_a_budget_is_refused_before_the_model_is_looked_at(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "with_sensitivity", lambda *_: pytest.fail("it was too early"))
    data = {"dataset": str(records), "samples": 8, "max_length": 64, "sensitivity": True}
    for budget, told in ((1.0, "cannot be met"), ("10MiB", "is enough for every layer as it is")):
        with pytest.raises(SchemeError, match=told):
            quantkit.quantize(model, out=tmp_path / "out", bits="auto", budget=budget, group_size=32, calibration=data)
    assert not (tmp_path / "out").exists()


def test_what_a_format_cannot_say_of_a_model_is_told_before_choices_are_measured(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "model", "mixtral", sliding_window=64)
    monkeypatch.setattr(mixing, "measured", lambda *_, **_more: pytest.fail("it was too early"))
    data = {"dataset": str(records), "samples": 8, "max_length": 64}
    with pytest.raises(SourceError, match="sliding_window"):
        quantkit.quantize(
            tmp_path / "model",
            out=tmp_path / "out",
            format="gguf",
            bits="auto",
            budget=6,
            method="rtn",
            calibration=data,
        )


def test_the_recipe_of_mixes_that_comes_along_runs(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its variants, of a tiny model on a few records."""
    monkeypatch.setattr(scores, "run_job", score_here)
    shipped = yaml.safe_load(Path("recipes/mixed.yaml").read_text(encoding="utf-8"))
    tiny = recipe_data(model, records, tmp_path / "run", shipped["variants"], defaults=shipped["defaults"])
    report = pipeline.run(Recipe.parse(yaml.safe_dump(tiny)), Notebook())
    bits = {row["name"]: row["bits_per_weight"] for row in report["variants"] if row["status"] == "ok"}
    assert list(bits) == ["mix-3.25", "mix-4.25", "int3", "int4"]
    for budget in (3.25, 4.25):
        assert budget - 0.15 < bits[f"mix-{budget}"] <= budget


def test_a_plan_does_not_mind_a_choice_that_suits_no_layer(recipe: Callable[..., Recipe]) -> None:
    """K-quants have blocks of 256 weights; the types of blocks of 32 are there as well."""
    given = {"name": "small", "bits": "auto", "format": "gguf", "method": "rtn", "budget": 5.0}
    (row,) = forecast(recipe(given, defaults={}))["variants"]
    assert row["state"] == "to do"
    assert row["scheme"] == "q2_k to q8_0, mixed"
    assert row["layers"][0] == 16
