"""Checks: what is a regression and what is not, on a tiny model that has learned something."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import EvaluationError, OutputError, QuantkitError, RecipeError
from quantkit.evaluation import stage as scores
from quantkit.recipe import Recipe
from quantkit.regression import Check, read_check
from quantkit.regression.api import accept, check, history
from quantkit.run_history import History
from quantkit.system.artifacts import read_json
from quantkit.system.locks import held
from tests.runs import Notebook, make_recipe, recipe_data, score_here, write_recipe, write_records
from tests.trained import make_trained

GATES = ["perplexity +1 %", "kl_divergence.mean +10 %", "size_bytes +0 %"]
GPTQ: dict[str, Any] = {"name": "int3", "method": "gptq", "bits": 3, "damping": 0.01}
EVALUATION = {
    "texts": ["prose"],
    "context_length": 64,
    "max_tokens": 4096,
    "metrics": ["perplexity", "kl_divergence", "top1_agreement"],
    "device": "cpu",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained(tmp_path_factory.mktemp("models") / "trained")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "instructions.jsonl", 24)


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    """Score in this process, which takes a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "run_job", score_here)
        yield


def recipe_of(model: Path, records: Path, out: Path, variant: dict[str, Any] = GPTQ, **changes: Any) -> Recipe:
    about = {"dataset": str(records), "samples": 24, "max_length": 64}
    settings = {"gates": GATES, "evaluation": EVALUATION, "calibration": about, **changes}
    settings["report"] = {"folder": str(out), "formats": ["json"]}
    return make_recipe(model, records, out, [variant], **settings)


@pytest.fixture(scope="module")
def accepted(trained: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Check]:
    """The folder of a recipe with one check, accepted."""
    out = tmp_path_factory.mktemp("reports") / "demo"
    first = check(recipe_of(trained, calibration, out))
    accept("latest", file=out.parent / "history.sqlite")
    return out, first


@pytest.fixture
def again(accepted: tuple[Path, Check], trained: Path, calibration: Path, tmp_path: Path) -> Callable[..., Check]:
    """Check a changed recipe beside the accepted run, on a copy of its folder and history."""
    shutil.copytree(accepted[0].parent, tmp_path / "reports")

    def check_again(
        model: Path = trained, records: Path = calibration, observer: Notebook | None = None, **changes: Any
    ) -> Check:
        return check(recipe_of(model, records, tmp_path / "reports" / "demo", **changes), observer)

    return check_again


def outcomes(found: Check) -> dict[str, str]:
    return {result.gate: result.outcome for result in found.gates}


def test_the_first_check_says_that_no_run_is_accepted_and_how_to_accept_one(accepted: tuple[Path, Check]) -> None:
    _, first = accepted
    assert (first.verdict, first.exit_code, first.run) == ("unknown", 2, 1)
    assert "no run is accepted for variant int3" in first.summary
    assert any("quantkit accept 1 --file" in note for note in first.notes)
    assert first.references == ()
    assert set(outcomes(first).values()) == {"unknown"}


def test_an_honest_check_passes_beside_the_accepted_run(again: Callable[..., Check]) -> None:
    found = again()
    assert (found.verdict, found.exit_code, found.run) == ("passed", 0, 2)
    assert [reference.run for reference in found.references] == [1]
    assert found.changes == ()
    assert found.layers == ()
    assert found.texts == ()


@pytest.mark.slow
def test_ten_honest_checks_that_quantize_anew_raise_no_alarm(again: Callable[..., Check], tmp_path: Path) -> None:
    verdicts = []
    for _ in range(10):
        shutil.rmtree(tmp_path / "reports" / "demo" / "variants")
        verdicts.append(again().verdict)
    assert verdicts == ["passed"] * 10


def damaged(source: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a model with one layer changed in its shard."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


DAMAGE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scaled": lambda weight: weight * 2.0,
    "noised": lambda weight: weight + weight.std() * torch.randn(weight.shape),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_layer_of_the_source_is_caught(
    again: Callable[..., Check], trained: Path, tmp_path: Path, kind: str
) -> None:
    torch.manual_seed(0)
    found = again(model=damaged(trained, tmp_path / "damaged", DAMAGE[kind]))
    assert found.exit_code == 1
    assert outcomes(found)["perplexity +1 %"] == "regressed"
    assert ("model", "content") in {(change.area, change.key) for change in found.changes}
    worst = next(result for result in found.gates if result.gate == "perplexity +1 %").worst
    assert worst is not None
    assert worst.low is not None
    assert worst.low > 0.0


def test_other_calibration_data_are_caught(again: Callable[..., Check], tmp_path: Path) -> None:
    records = tmp_path / "other.jsonl"
    row = {"instruction": "0 0 0 0", "input": "", "output": "0 0 0 0 0 0 0 0 0 0 0 0"}
    records.write_text("".join(json.dumps(row | {"instruction": "0 " * (4 + n)}) + "\n" for n in range(24)))
    found = again(records=records)
    assert outcomes(found)["kl_divergence.mean +10 %"] == "regressed"
    assert ("calibration", "tokens") in {(change.area, change.key) for change in found.changes}


def test_a_lower_damping_is_caught(again: Callable[..., Check]) -> None:
    found = again(variant={**GPTQ, "damping": 1e-6})
    assert found.exit_code == 1
    assert outcomes(found)["kl_divergence.mean +10 %"] == "regressed"
    (change,) = [change for change in found.changes if change.area == "recipe"]
    assert (change.key, change.before, change.after) == ("variants.int3.options.damping", "0.01", "1e-06")


def test_fewer_bits_in_one_layer_are_caught_and_the_layer_is_named(again: Callable[..., Check]) -> None:
    found = again(variant={**GPTQ, "overrides": {"layers.0.mlp.down_proj": {"bits": 2}}})
    assert (found.exit_code, outcomes(found)["kl_divergence.mean +10 %"]) == (1, "regressed")
    worst = found.layers[0]
    assert worst.layer == "model.layers.0.mlp.down_proj"
    assert worst.ratio is not None
    assert worst.ratio > 3
    assert (worst.scheme_before, worst.scheme_after) == ("int3 g32 sym", "int2 g32 sym")
    text = found.texts[0]
    assert (text.text, text.metric) == ("prose", "kl_divergence")
    window = text.windows[0]
    assert window.after > window.before
    assert window.tokens[0].divergence > window.after
    assert window.tokens[0].context


def test_the_document_is_read_back_as_it_was_written(again: Callable[..., Check], tmp_path: Path) -> None:
    found = again(variant={**GPTQ, "bits": 2})
    assert read_check(tmp_path / "reports" / "demo") == found
    (own,) = (tmp_path / "reports" / "demo" / "runs").glob("0002-*")
    assert read_check(own) == found
    assert str(tmp_path) not in (own / "check.json").read_text(encoding="utf-8")


def test_other_evaluation_data_are_not_compared(again: Callable[..., Check]) -> None:
    found = again(evaluation={**EVALUATION, "max_tokens": 2048})
    assert (found.verdict, found.exit_code) == ("unknown", 2)
    about = {result.gate: result for result in found.gates}
    assert "other tokens" in about["perplexity +1 %"].reason
    worst = about["perplexity +1 %"].worst
    assert worst is not None
    assert worst.difference is None
    assert about["size_bytes +0 %"].outcome == "passed"
    longer = again(evaluation={**EVALUATION, "context_length": 32})
    assert "context length 32, and in the other at 64" in longer.summary


def test_a_variant_that_fails_cannot_be_told(again: Callable[..., Check], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise EvaluationError("the worker was killed")

    monkeypatch.setattr("quantkit.pipeline.rows.score_beside", fail)
    found = again()
    assert (found.verdict, found.exit_code) == ("unknown", 2)
    assert "variant int3 failed: the worker was killed" in found.summary


def test_every_file_is_scored_anew_and_the_checkpoint_is_reused(
    accepted: tuple[Path, Check], again: Callable[..., Check], tmp_path: Path
) -> None:
    folder = tmp_path / "reports" / "demo"
    weights, result = (folder / name for name in ("variants/int3/model.safetensors", "evaluations/int3/result.json"))
    before = weights.stat().st_ino, result.stat().st_ino
    again()
    assert weights.stat().st_ino == before[0]
    assert result.stat().st_ino != before[1]
    assert not (folder / "baseline" / "logprobs").exists()


def test_retention_keeps_the_last_runs_and_the_accepted_one_and_what_others_put_there(
    again: Callable[..., Check], tmp_path: Path
) -> None:
    runs = tmp_path / "reports" / "demo" / "runs"
    (runs / "0000-mine").mkdir(parents=True)
    (runs / "0000-mine" / "notes.txt").write_text("mine")
    retention = {"runs": 2}
    again(retention=retention)
    (note,) = [*runs.glob("0002-*")]
    (note / "notes.txt").write_text("mine too")
    again(retention=retention)
    found = again(retention=retention)
    assert [path.name[:4] for path in sorted(runs.iterdir())] == ["0000", "0001", "0002", "0003", "0004"]
    assert [path.name for path in note.rglob("*")] == ["notes.txt"]
    assert (runs / "0000-mine" / "notes.txt").read_text() == "mine"
    assert [Path(path).name[:4] for path in found.removed] == ["0002"]
    (first,) = runs.glob("0001-*")
    manifest = read_json(first / "variants" / "int3" / "manifest.json")
    assert set(manifest["files"]) <= {path.name for path in (first / "variants" / "int3").iterdir()}
    assert found.references[0].checkpoint is not None


def test_another_accepted_run_gives_the_first_one_s_folder_back(again: Callable[..., Check], tmp_path: Path) -> None:
    again(retention={"runs": 1})
    accept(2, file=tmp_path / "reports" / "history.sqlite")
    found = again(retention={"runs": 1})
    assert [reference.run for reference in found.references] == [2]
    kept = sorted(path.name[:4] for path in (tmp_path / "reports" / "demo" / "runs").iterdir())
    assert kept == ["0002", "0003"]


def test_a_check_that_cannot_be_recorded_is_not_clean(again: Callable[..., Check], tmp_path: Path) -> None:
    file = tmp_path / "reports" / "history.sqlite"
    notebook = Notebook()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(History, "append", refuse)
        found = again(observer=notebook)
    assert (found.verdict, found.exit_code, found.run) == ("passed", 2, None)
    assert any("this run is not in the history: history is full" in note for note in notebook.notes)
    assert read_check(tmp_path / "reports" / "demo") == found
    assert [run["id"] for run in history(file=file)] == [1]


def refuse(*_: Any) -> int:
    raise OutputError("history is full", "free some space")


def test_a_damaged_history_stops_a_check_before_any_work(again: Callable[..., Check], tmp_path: Path) -> None:
    (tmp_path / "reports" / "history.sqlite").write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)
    notebook = Notebook()
    with pytest.raises(QuantkitError, match=r"history.sqlite: it is (damaged|not an SQLite file)"):
        again(observer=notebook)
    assert notebook.stages == []


def test_a_recipe_without_gates_or_history_is_refused(trained: Path, calibration: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has no gates"):
        check(recipe_of(trained, calibration, tmp_path / "demo", gates=[]))
    with pytest.raises(RecipeError, match=r"history\.enabled"):
        check(recipe_of(trained, calibration, tmp_path / "demo", history={"enabled": False}))
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_cannot_run_is_recorded_with_the_reason(trained: Path, calibration: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "nowhere", calibration, tmp_path / "reports" / "demo")
    with pytest.raises(QuantkitError):
        check(recipe)
    (run,) = history(recipe)
    assert (run["kind"], run["status"], run["variants"]) == ("check", "error", ())
    assert "nowhere" in run["error"]
    assert str(Path.home()) not in run["error"].replace(str(tmp_path), "")


@pytest.fixture
def shell(trained: Path, calibration: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the command line on a small recipe in a folder of its own."""
    about = {"gates": ["kl_divergence.mean <= 100"], "evaluation": {**EVALUATION, "max_tokens": 128}}
    data = recipe_data(trained, calibration, Path("reports/demo"), [{"name": "rtn", "method": "rtn"}], **about)
    write_recipe(tmp_path / "demo.yaml", data)

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "import quantkit.cli; quantkit.cli.main()", *arguments]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def test_a_second_check_says_who_is_at_work_and_leaves(
    shell: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    with held(tmp_path / "reports" / "demo", "check demo", inside=True):
        second = shell("check", "demo.yaml")
        _, said = second.communicate()
    assert second.returncode == 2
    assert said.count("\n") == 1
    assert f"reports/demo is being written by process {os.getpid()}" in said
    assert "check demo" in said
    assert not (tmp_path / "reports" / "history.sqlite").exists()


@pytest.mark.slow
def test_a_killed_check_loses_nothing_and_the_next_one_goes_on(
    shell: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    first = shell("check", "demo.yaml")
    first.communicate()
    assert first.returncode == 0
    victim = shell("check", "demo.yaml")
    assert victim.stderr is not None
    assert any("baseline" in line for line in victim.stderr)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    third = shell("check", "demo.yaml", "--json")
    said, _ = third.communicate()
    assert third.returncode == 0
    assert json.loads(said)["verdict"] == "passed"
    assert [run["id"] for run in history(file=tmp_path / "reports" / "history.sqlite")] == [1, 2]
