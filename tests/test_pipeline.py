from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import pipeline
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CalibrationError, CheckpointError, OutputError, QuantkitError, RecipeError
from quantkit.evaluation import stage as scores
from quantkit.methods.rtn import Rtn
from quantkit.pipeline.plan import forecast
from quantkit.recipe import EvaluationSpec, Recipe
from quantkit.system.artifacts import read_json
from tests.runs import (
    Notebook,
    decoded_model,
    files_with_times,
    hidden_names,
    load_whole,
    logits,
    make_recipe,
    score_here,
    write_records,
)
from tests.tiny import make_model

VARIANTS: list[dict[str, Any]] = [
    {"name": "rtn8", "method": "rtn", "bits": 8, "group_size": -1},
    {"name": "gptq4", "method": "gptq", "overrides": {"down_proj": {"bits": 8}}},
    {"name": "gptq2", "method": "gptq", "bits": 2, "damping": 0.05},
    {"name": "misfit", "method": "rtn", "group_size": 128},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", tie_word_embeddings=True, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "instructions.jsonl")


@pytest.fixture(scope="module")
def finished(model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Any]]:
    """One whole run, scored in processes of their own."""
    out = tmp_path_factory.mktemp("runs") / "run"
    recipe = make_recipe(model, records, out, VARIANTS, gates=["kl_divergence.mean <= 100"])
    return recipe, pipeline.run(recipe, Notebook())


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score in this process, which takes a tenth of the time."""
    monkeypatch.setattr(scores, "run_job", score_here)


@pytest.fixture
def rerun(
    model: Path, records: Path, tmp_path: Path, in_process: None
) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """Run a recipe with some keys changed into the same folder; returns the report and what was reused."""

    def run(variants: list[dict[str, Any]], **changes: Any) -> tuple[dict[str, Any], list[str]]:
        notebook = Notebook()
        report = pipeline.run(make_recipe(model, records, tmp_path / "run", variants, **changes), notebook)
        return report, [note for note in notebook.notes if "reused" in note]

    return run


def reused(*names: str) -> list[str]:
    return [
        "baseline: reused the finished evaluation",
        *(f"{name}: reused the finished {what}" for name in names for what in ("checkpoint", "evaluation")),
    ]


RTN: dict[str, Any] = {"name": "rtn", "method": "rtn"}
GPTQ: dict[str, Any] = {"name": "gptq", "method": "gptq"}


@pytest.mark.usefixtures("in_process")
def test_variants_are_quantized_on_the_device_of_their_own_section(model: Path, records: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"quantization": {"device": "cuda:99"}}
    recipe = make_recipe(model, records, tmp_path / "out", [{"name": "rtn", "method": "rtn"}], **keys)
    with pytest.raises(QuantkitError, match=r"quantization\.device: device cuda:99 is not available"):
        pipeline.run(recipe, Notebook())


def test_the_report_says_all_that_was_asked_and_found(finished: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, report = finished
    assert json.loads((recipe.folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert set(report) == {
        *("schema", "name", "title", "created", "status", "quantkit_version", "recipe", "recipe_text", "source"),
        *("calibration", "environment", "baseline", "variants", "gates"),
        *("recommendation", "stages"),
    }
    assert report["recipe"] == recipe.resolved()
    assert Recipe.parse(report["recipe_text"]).variants == recipe.variants
    assert report["source"]["dtype"] == "bfloat16"
    names = CheckpointReader(Path(recipe.model.source)).names()
    assert report["source"]["parameters"] == sum(
        CheckpointReader(Path(recipe.model.source)).read(name).numel() for name in names
    )
    assert report["calibration"]["token_ids_sha256"]
    assert report["baseline"]["metrics"]["perplexity"]["prose"] > 1
    assert {"html", "md"} <= {path.suffix[1:] for path in recipe.folder.glob("report.*")}


def test_a_row_holds_settings_errors_of_layers_and_figures(finished: tuple[Recipe, dict[str, Any]]) -> None:
    _, report = finished
    row = report["variants"][1]
    assert set(row) == {
        *("name", "status", "error", "method", "format", "scheme", "bits", "group_size", "symmetric", "options"),
        *("checkpoint", "bits_per_weight", "layers", "notes", "metrics", "texts", "size_bytes", "memory", "speed"),
        *("seconds", "loaded_by", "scored_on", "bits_per_weight_file", "share", "experts"),
        *("server", "samples", "rounded_inputs"),
    }
    assert row["server"]["bytes"] > row["size_bytes"]
    assert row["server"]["bytes"] < report["baseline"]["server"]["bytes"]
    assert row["server"]["bytes_with_device"] - row["server"]["bytes"] == 600 * 2**20
    assert (row["name"], row["status"], row["error"]) == ("gptq4", "ok", None)
    assert {layer["scheme"] for layer in row["layers"]} == {"int4 g32 sym", "int8 g32 sym"}
    assert row["metrics"]["kl_divergence"]["prose"]["mean"] > 0
    assert row["options"]["refinements"] == 1
    eight, _, two, _ = report["variants"]
    assert eight["metrics"]["kl_divergence"]["prose"]["mean"] < two["metrics"]["kl_divergence"]["prose"]["mean"]


def test_a_variant_that_fails_is_a_row_with_the_reason_and_the_others_succeed(
    finished: tuple[Recipe, dict[str, Any]],
) -> None:
    recipe, report = finished
    assert [row["status"] for row in report["variants"]] == ["ok", "ok", "ok", "failed"]
    assert report["status"] == "failed"
    error = report["variants"][3]["error"]
    assert "77.8% of the block weights would stay float, such as model.layers.0.mlp.gate_proj: group_size 128" in error
    assert "sizes that do: 64, 32" in error
    assert not (recipe.folder / "variants" / "misfit").exists()
    verdicts = {verdict["variant"]: verdict["passed"] for verdict in report["gates"]}
    assert verdicts == {"rtn8": True, "gptq4": True, "gptq2": True, "misfit": False}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_every_checkpoint_loads_in_transformers_as_it_decodes(
    finished: tuple[Recipe, dict[str, Any]], index: int
) -> None:
    recipe, report = finished
    folder = Path(report["variants"][index]["checkpoint"])
    wanted = decoded_model(Path(recipe.model.source), folder, recipe.own_variants[index])
    torch.testing.assert_close(logits(load_whole(folder)), logits(wanted), rtol=1e-4, atol=1e-4)


def test_every_file_of_a_checkpoint_has_the_hash_of_its_manifest(finished: tuple[Recipe, dict[str, Any]]) -> None:
    _, report = finished
    folder = Path(report["variants"][1]["checkpoint"])
    manifest = read_json(folder / "manifest.json")
    present = {path.name for path in folder.iterdir()} - {"manifest.json", "stage.json", "README.md"}
    assert set(manifest["files"]) == present
    assert {"config.json", "chat_template.jinja", "generation_config.json", "recipe.yaml", "tokenizer.json"} <= present
    for name, facts in manifest["files"].items():
        assert facts["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert manifest["calibration_sha256"] == report["calibration"]["token_ids_sha256"]


def test_the_card_of_a_checkpoint_tells_what_was_measured(finished: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, report = finished
    row = report["variants"][1]
    folder = Path(row["checkpoint"])
    text = (folder / "README.md").read_text(encoding="utf-8")
    name = next(iter(row["metrics"]["perplexity"]))
    assert f"{row['metrics']['perplexity'][name]:.4f}" in text
    assert f"{row['metrics']['kl_divergence'][name]['mean']:.5f}" in text
    assert f"# {row['name']}\n" in text
    assert recipe.model.source not in (folder / "manifest.json").read_text(encoding="utf-8")


def test_a_card_that_was_removed_is_written_again(finished: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, report = finished
    file = Path(report["variants"][1]["checkpoint"]) / "README.md"
    text = file.read_text(encoding="utf-8")
    file.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.evaluation.stage.run_job", score_here)
        again = quantkit.run(recipe)
    assert again["variants"][1]["status"] == "ok"
    assert file.read_text(encoding="utf-8") == text


def test_nothing_half_written_is_left(finished: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, _ = finished
    assert hidden_names(recipe.folder.parent) == []


def test_a_plan_of_a_finished_run_says_so_and_its_sizes_are_right(finished: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, report = finished
    fitting = recipe.model_copy(update={"variants": recipe.variants[:3]})
    found = forecast(fitting)
    assert [variant["state"] for variant in found["variants"]] == [
        "finished",
        *["finished, for the calibration set that is there"] * 2,
    ]
    assert found["baseline"] == found["calibration"]["state"] == "there, to be checked"
    for planned, row in zip(found["variants"], report["variants"], strict=False):
        assert planned["size_bytes"] == row["size_bytes"]
        assert planned["layers"] == (14, 15)


def test_a_plan_before_a_run_writes_nothing(model: Path, records: Path, tmp_path: Path) -> None:
    found = forecast(make_recipe(model, records, tmp_path / "run", [RTN, GPTQ]))
    assert [variant["state"] for variant in found["variants"]] == ["to do", "to do"]
    assert [variant["strategy"] for variant in found["variants"]] == ["weights only", "one-pass"]
    assert (found["baseline"], found["calibration"]["state"]) == ("to do", "to do")
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_redoes_nothing(rerun: Callable[..., Any], tmp_path: Path) -> None:
    first, notes = rerun([RTN, GPTQ])
    assert notes == []
    times = files_with_times(tmp_path / "run")
    second, notes = rerun([RTN, GPTQ])
    assert notes == reused("rtn", "gptq")
    written_anew = {name for name, time in files_with_times(tmp_path / "run").items() if times[name] != time}
    written_anew.remove("logs/events.jsonl")  # says of every run what happened in it
    assert all(name.startswith(("report.", "divergence", "perplexity")) for name in written_anew)
    assert {key: first[key] for key in ("variants", "baseline")} == {
        key: second[key] for key in ("variants", "baseline")
    }


def test_a_changed_option_redoes_its_variant_and_no_other(rerun: Callable[..., Any]) -> None:
    rerun([RTN, GPTQ])
    _, notes = rerun([RTN, {**GPTQ, "damping": 0.5}])
    assert notes == reused("rtn")


def test_a_changed_calibration_redoes_what_was_calibrated(rerun: Callable[..., Any], records: Path) -> None:
    rerun([RTN, GPTQ])
    calibration = {"dataset": str(records), "samples": 12, "max_length": 48, "seed": 1}
    _, notes = rerun([RTN, GPTQ], calibration=calibration)
    assert notes == reused("rtn")
    _, notes = rerun([RTN, GPTQ], calibration={**calibration, "inputs": "float"})
    assert notes == reused("rtn")


def test_figures_of_two_devices_never_stand_in_one_table(
    rerun: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rerun([RTN])

    def computed_on_a_gpu(spec: EvaluationSpec) -> dict[str, str]:
        return {**here(spec), "device": "NVIDIA A100", "dtype": "bfloat16"}

    def scored_on_a_gpu(*given: Any, **options: Any) -> dict[str, Any]:
        result = score_here(*given, **options)
        result["environment"] |= {"device": "cuda:0", "dtype": "bfloat16"}
        return result

    here = scores.computed
    monkeypatch.setattr(scores, "computed", computed_on_a_gpu)
    monkeypatch.setattr(scores, "run_job", scored_on_a_gpu)
    report, notes = rerun([RTN, GPTQ])
    assert notes == ["rtn: reused the finished checkpoint"]
    rows = [report["baseline"], *report["variants"]]
    assert {row["scored_on"]["device"] for row in rows} == {"cuda:0"}
    assert rerun([RTN, GPTQ])[1] == reused("rtn", "gptq")
    log = (tmp_path / "run" / "logs" / "events.jsonl").read_text(encoding="utf-8")
    assert log.count("computed otherwise: device cpu, now NVIDIA A100, dtype float32, now bfloat16") == 1


def test_what_figures_are_computed_by_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = scores.computed(EvaluationSpec(device="cpu"))
    assert on_cpu == scores.computed(EvaluationSpec(device="cpu", dtype="float32"))
    assert (on_cpu["device"], on_cpu["dtype"]) == ("cpu", "float32")
    assert on_cpu["torch"] == version("torch")
    assert scores.computed(EvaluationSpec(device="cpu", dtype="bfloat16"))["dtype"] == "bfloat16"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA A100")
    assert scores.computed(EvaluationSpec()) == {**on_cpu, "device": "NVIDIA A100", "dtype": "the checkpoint's"}


def test_changed_evaluation_settings_redo_the_evaluations_alone(rerun: Callable[..., Any]) -> None:
    rerun([RTN, GPTQ])
    settings = {"texts": ["answers"], "context_length": 32, "max_tokens": 64, "metrics": ["perplexity"]}
    report, notes = rerun([RTN, GPTQ], evaluation=settings)
    assert notes == [f"{name}: reused the finished checkpoint" for name in ("rtn", "gptq")]
    assert list(report["variants"][0]["metrics"]) == ["perplexity"]


def test_a_changed_text_of_the_users_redoes_the_evaluations(rerun: Callable[..., Any], tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    settings = {"texts": [str(text)], "context_length": 32, "max_tokens": 64, "metrics": ["perplexity"]}
    text.write_text("The tide went out further than anyone had seen. " * 4)
    rerun([RTN], evaluation=settings)
    assert rerun([RTN], evaluation=settings)[1] == reused("rtn")
    text.write_text("The kettle sang before anyone had thought of tea. " * 4)
    assert rerun([RTN], evaluation=settings)[1] == ["rtn: reused the finished checkpoint"]


def test_a_variant_that_left_the_recipe_does_not_matter(rerun: Callable[..., Any]) -> None:
    rerun([RTN, GPTQ])
    report, notes = rerun([RTN])
    assert notes == reused("rtn")
    assert [row["name"] for row in report["variants"]] == ["rtn"]


@pytest.mark.parametrize(
    ("damaged", "kept"),
    [
        ("variants/rtn/model.safetensors", ["baseline: reused the finished evaluation"]),
        ("evaluations/rtn/result.json", ["baseline: reused the finished evaluation"]),
        ("baseline/logprobs", []),
    ],
)
def test_what_was_damaged_since_is_made_again(
    rerun: Callable[..., Any], tmp_path: Path, damaged: str, kept: list[str]
) -> None:
    first, _ = rerun([RTN])
    place = tmp_path / "run" / damaged
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()
    second, notes = rerun([RTN])
    assert notes[: len(kept)] == kept
    assert ("baseline: reused the finished evaluation" in notes) == bool(kept)
    assert place.exists()
    assert second["variants"][0]["metrics"] == first["variants"][0]["metrics"]


def test_a_variant_called_baseline_keeps_its_log_apart(rerun: Callable[..., Any], tmp_path: Path) -> None:
    report, _ = rerun([{**RTN, "name": "baseline"}])
    assert report["status"] == "ok"
    logs = {path.name for path in (tmp_path / "run" / "logs").iterdir()}
    assert logs == {"baseline.log", "evaluate-baseline.log", "events.jsonl"}


def test_an_unexpected_error_keeps_its_traceback_and_the_other_variants(
    rerun: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Rtn, *args: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Rtn, "quantize", broken)
    report, _ = rerun([RTN, GPTQ])
    assert [row["status"] for row in report["variants"]] == ["failed", "ok"]
    log = tmp_path / "run" / "logs" / "traceback-rtn.log"
    assert report["variants"][0]["error"] == f"ZeroDivisionError: a bug (unexpected: the traceback is in {log})"
    assert "Traceback" in log.read_text()


def test_an_interrupted_run_keeps_what_is_finished_and_goes_on_from_there(
    rerun: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Notebook, step: str, done: int, total: int) -> None:
        if self.stages[-1] == "quantize: gptq" and done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Notebook, "progress", interrupt)
        with pytest.raises(KeyboardInterrupt):
            rerun([RTN, GPTQ])
    variants = tmp_path / "run" / "variants"
    assert sorted(path.name for path in variants.iterdir()) == [".gptq.layers", "rtn"]
    report, notes = rerun([RTN, GPTQ])
    assert notes == reused("rtn")
    assert report["status"] == "ok"
    assert any(note.startswith("went on after a run that ended early") for note in report["variants"][1]["notes"])
    assert hidden_names(tmp_path) == []


def test_gates_decide_the_status(rerun: Callable[..., Any]) -> None:
    assert rerun([RTN], gates=["kl_divergence.prose.mean <= 100"])[0]["status"] == "ok"
    assert rerun([RTN], gates=["kl_divergence.prose.mean <= 0"])[0]["status"] == "failed"


def test_a_recipe_without_a_calibrated_method_reads_no_data_set(rerun: Callable[..., Any], tmp_path: Path) -> None:
    report, _ = rerun([RTN], calibration={"dataset": "/no/such/file.jsonl"})
    assert report["status"] == "ok"
    assert report["calibration"] is None
    assert not (tmp_path / "run" / "calibration").exists()


def test_a_weight_that_is_not_finite_is_named_before_anything_runs(records: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"tensor 'model.layers.1.mlp.up_proj.weight' .* is inf at index \[0, 0\]"
    ):
        pipeline.run(make_recipe(source, records, tmp_path / "run", [RTN]), Notebook())
    assert hidden_names(tmp_path) == []
    assert not (tmp_path / "run" / "baseline").exists()


def test_a_data_set_without_records_is_refused(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(CalibrationError, match=r"empty\.jsonl"):
        pipeline.run(make_recipe(model, empty, tmp_path / "run", [GPTQ]), Notebook())
    assert hidden_names(tmp_path) == []


@pytest.mark.parametrize("foreign", ["baseline", "variants/rtn"])
def test_a_folder_of_the_users_is_found_before_any_work(
    model: Path, records: Path, tmp_path: Path, foreign: str
) -> None:
    (tmp_path / "run" / foreign).mkdir(parents=True)
    (tmp_path / "run" / foreign / "thesis.tex").write_text("x")
    notebook = Notebook()
    with pytest.raises(OutputError, match="exists and was not written by quantkit"):
        pipeline.run(make_recipe(model, records, tmp_path / "run", [RTN]), notebook)
    assert notebook.stages == []


def test_a_gate_on_a_figure_that_is_not_taken_is_refused_with_the_recipe(model: Path, records: Path) -> None:
    with pytest.raises(RecipeError, match="needs speed"):
        make_recipe(model, records, Path("x"), [RTN], gates=["speed.decode_tokens_per_second >= 1"])
