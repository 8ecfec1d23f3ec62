"""A tracking server is told of a run; one that is down costs a note and nothing else."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quantkit import report
from quantkit.cli import app
from quantkit.errors import MissingDependencyError, OutputError, RecipeError
from quantkit.pipeline import run
from quantkit.publishing.mlflow import SECRETS, URI, _environment, check_tracking, track, track_after
from quantkit.publishing.mlflow_record import LONGEST_VALUE, figures, tracked
from quantkit.recipe import MlflowSpec, Recipe, TrackingSpec
from tests.mlflow_server import Server, mlflow_server
from tests.runs import Notebook, recipe_data

SECRET = "s3cr3t-of-the-server"


@pytest.fixture(autouse=True)
def no_server_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (URI, *SECRETS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def server() -> Iterator[Server]:
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("tracking needs quantkit-ptq[mlflow]")
    with mlflow_server() as started:
        yield started


def content(**changes: Any) -> dict[str, Any]:
    def row(name: str, **more: Any) -> dict[str, Any]:
        figure = {"value": 0.5, "stderr": 0.1, "samples": 9, "prompts_checksum": 12345}
        return {
            "name": name,
            "status": "ok",
            "error": None,
            "method": "rtn",
            "format": "gptq",
            "metrics": {"perplexity": {"prose": 9.5}, "tasks": {"sums.acc": figure}},
            "size_bytes": 1000,
            "memory": {"peak_bytes": 5, "peak_kind": "RSS"},
            "speed": {"decode": {"seconds_per_token": [0.1, 0.2]}, "decode_tokens_per_second": math.nan},
            **more,
        }

    failed = {"name": "b", "status": "failed", "error": "no Cholesky factor", "method": "gptq"}
    return {
        "schema": 1,
        "name": "weekly",
        "created": "2025-11-21T23:40:12+00:00",
        "status": "failed",
        "quantkit_version": "0.1.0",
        "recipe": {
            "name": "weekly",
            "model": {"source": "org/model"},
            "evaluation": {"texts": [{"name": "prose"}], "tasks": []},
            "variants": [{"name": "a", "bits": 4}, {"name": "b", "bits": 3}, {"name": "c"}],
        },
        "source": {"reference": "org/model", "fingerprint": "f00"},
        "calibration": {"token_ids_sha256": "ca11"},
        "environment": {"device": "cpu", "packages": {"torch": "2.13.0"}},
        "baseline": row("baseline"),
        "variants": [row("a"), failed, row("c")],
        "gates": [{"gate": "perplexity <= 9", "variant": "c", "passed": False}],
        **changes,
    }


def written(folder: Path, **changes: Any) -> Path:
    report.write(content(**changes), folder, ("html", "md"))
    return folder


# The record


def test_the_record_has_what_was_asked_for_what_was_found_and_with_what() -> None:
    record = tracked(content())
    assert (record.name, record.failed) == ("weekly", True)
    assert record.params == {"name": "weekly", "model.source": "org/model", "evaluation.texts.0.name": "prose"}
    assert record.metrics["baseline.perplexity.prose"] == 9.5
    assert record.tags["quantkit.source_fingerprint"] == "f00"
    assert record.tags["quantkit.calibration_fingerprint"] == "ca11"
    assert record.tags["package.torch"] == "2.13.0"
    assert [(each.name, each.failed, each.params["name"]) for each in record.nested] == [
        ("a", False, "a"), ("b", True, "b"), ("c", True, "c")
    ]  # fmt: skip
    assert record.nested[0].params["bits"] == "4"
    assert record.nested[1].tags["quantkit.error"] == "no Cholesky factor"
    assert record.nested[1].metrics == {}
    assert record.nested[2].tags["quantkit.gates_missed"] == "perplexity <= 9"


def test_figures_are_the_finite_numbers_of_a_row() -> None:
    assert figures(content()["variants"][0]) == {
        "perplexity.prose": 9.5, "tasks.sums.acc": 0.5, "tasks.sums.acc.stderr": 0.1, "tasks.sums.acc.samples": 9,
        "size_bytes": 1000, "memory.peak_bytes": 5,
    }  # fmt: skip


def test_a_long_value_is_cut_to_what_the_server_takes() -> None:
    found = tracked(content(recipe={"name": "x" * 9000, "variants": []}))
    assert len(found.params["name"]) == LONGEST_VALUE


# Before the run


@pytest.mark.parametrize("uri", ["http://me:word@host:5000", "https://token@host"])
def test_credentials_in_a_recipe_are_refused_and_not_repeated_as_advice(uri: str) -> None:
    data = recipe_data(Path("m"), Path("r"), Path("o"), [{"name": "a"}], tracking={"mlflow": {"uri": uri}})
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_PASSWORD"):
        Recipe.parse(json.dumps(data))


def test_without_an_address_nothing_is_begun(tmp_path: Path) -> None:
    data = recipe_data(tmp_path / "m", tmp_path / "r", tmp_path / "o", [{"name": "a"}], tracking={"mlflow": {}})
    observer = Notebook()
    with pytest.raises(RecipeError, match=r"tracking\.mlflow has no uri"):
        run(Recipe.model_validate(data), observer)
    assert observer.stages == []
    with pytest.raises(RecipeError, match=r"tracking\.mlflow has no uri"):
        check_tracking(TrackingSpec(mlflow=MlflowSpec()))
    check_tracking(TrackingSpec())


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "mlflow" else found(name))
    with pytest.raises(MissingDependencyError, match=r"pip install 'quantkit-ptq\[mlflow\]'"):
        check_tracking(TrackingSpec(mlflow=MlflowSpec(uri="http://127.0.0.1:1")))


def test_the_process_sends_no_statistics_and_does_not_wait_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    assert _environment()["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert _environment()["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    assert _environment()["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "7"


# After the run


def test_a_server_gets_a_run_with_one_for_each_variant_and_the_report(server: Server, tmp_path: Path) -> None:
    recipe = {**content()["recipe"], "many": {f"key{number}": number for number in range(250)}}
    folder, observer = written(tmp_path, recipe=recipe), Notebook()
    track_after(TrackingSpec(mlflow=MlflowSpec(uri=server.uri, experiment="weekly")), folder, observer)
    parent, *variants = server.runs.values()
    (run_id, *_) = server.runs
    assert (parent.name, parent.status, parent.experiment) == ("weekly", "FAILED", server.experiments["weekly"])
    assert len(parent.params) == 253
    assert parent.metrics["baseline.tasks.sums.acc"] == 0.5
    assert [(each.name, each.status, each.tags["mlflow.parentRunId"]) for each in variants] == [
        ("a", "FINISHED", run_id), ("b", "FAILED", run_id), ("c", "FAILED", run_id)
    ]  # fmt: skip
    assert variants[0].metrics["perplexity.prose"] == 9.5
    place = f"{parent.experiment}/{run_id}/artifacts"
    names = ("report.json", "report.html", "report.md")
    assert server.artifacts == {f"{place}/{name}": (folder / name).read_bytes() for name in names}
    assert json.loads((folder / "tracking.json").read_text(encoding="utf-8"))["run_id"] == run_id
    assert observer.notes == [f"MLflow at {server.uri} was told of the run: {run_id}"]


def test_a_server_that_is_down_costs_a_note_and_is_told_later(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, observer = written(tmp_path), Notebook()
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{taken.getsockname()[1]}"
        track_after(TrackingSpec(mlflow=MlflowSpec(uri=away)), folder, observer)
        refused = CliRunner().invoke(app, ["track", str(folder), "--uri", away])
    (note,) = observer.notes
    assert note.startswith(f"MLflow at {away} was not told of the run: ")
    assert f"nothing is lost; tell it later: quantkit track {folder}" in note
    assert "\n" not in note
    assert refused.exit_code == 2
    assert not (folder / "tracking.json").exists()
    assert report.load(folder)["name"] == "weekly"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    told = CliRunner().invoke(app, ["track", str(folder), "--experiment", "late"])
    assert told.exit_code == 0, told.output
    assert list(server.experiments) == ["late"]


def test_a_server_that_refuses_says_why(server: Server, tmp_path: Path) -> None:
    server.refuse = "runs/log-batch"
    with pytest.raises(OutputError, match=r"refused: /api/2\.0/mlflow/runs/log-batch"):
        track(MlflowSpec(uri=server.uri), written(tmp_path))
    assert server.runs == {}, "a run is left as if it were running"


def test_patterns_are_values_and_a_report_that_is_told_again_stands_there_once(server: Server, tmp_path: Path) -> None:
    recipe = content()["recipe"]
    patterns = {r"mlp\.down_proj$": {"bits": 8}, "(q|k|v)_proj": {"scheme": "fp8"}}
    recipe["variants"][0]["overrides"] = patterns
    recipe["odd"] = {"a(b)|c/../d": 1}
    folder = written(tmp_path, recipe=recipe)
    for _ in range(2):
        told = track(MlflowSpec(uri=server.uri), folder)
    assert len(server.runs) == 4
    assert next(iter(server.runs)) == told["run_id"]
    parent, first, *_ = server.runs.values()
    assert parent.params["odd.a_b__c_.._d"] == "1"
    assert first.params["overrides.0.pattern"] == r"mlp\.down_proj$"
    assert first.params["overrides.0.bits"] == "8"
    assert first.params["overrides.1.pattern"] == "(q|k|v)_proj"
    assert {run.status for run in server.runs.values()} == {"FINISHED", "FAILED"}


def test_a_token_goes_to_the_server_and_nowhere_else(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    told = track(MlflowSpec(uri=server.uri), written(tmp_path))
    assert {headers.get("Authorization") for headers in server.headers} == {f"Bearer {SECRET}"}
    logged = json.dumps([[each.params, each.tags, each.metrics] for each in server.runs.values()])
    files = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET not in logged + files + json.dumps(told)


def test_credentials_in_the_environments_address_are_not_repeated(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri.replace("//", f"//me:{SECRET}@"))
    told = track(MlflowSpec(), written(tmp_path))
    assert told["uri"] == server.uri.replace("//", "//***@")
    server.refuse = "runs/create"
    with pytest.raises(OutputError) as caught:
        track(MlflowSpec(), tmp_path)
    files = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET not in str(caught.value) + files


@pytest.mark.slow
def test_a_real_server_lists_the_run_as_it_was_logged(tmp_path: Path) -> None:
    program = shutil.which("mlflow", path=str(Path(sys.executable).parent))
    if program is None or importlib.util.find_spec("flask") is None:
        pytest.skip("needs MLflow with its server: pip install mlflow")
    from mlflow.tracking import MlflowClient

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.sqlite'}", "--workers", "1"]
    keep = ["--artifacts-destination", str(tmp_path / "artifacts")]
    command = [program, "server", "--host", "127.0.0.1", "--port", str(port), *store, *keep]
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            _wait_for(uri, running)
            told = track(MlflowSpec(uri=uri, experiment="weekly"), written(tmp_path / "run"))
            client = MlflowClient(tracking_uri=uri)
            found = client.search_runs([told["experiment_id"]])
            parent = client.get_run(told["run_id"])
            files = [each.path for each in client.list_artifacts(told["run_id"])]
        finally:
            running.terminate()
    assert sorted(each.info.run_name for each in found) == ["a", "b", "c", "weekly"]
    assert parent.data.metrics["baseline.perplexity.prose"] == 9.5
    assert parent.data.params["model.source"] == "org/model"
    assert parent.info.status == "FAILED"
    assert sorted(files) == ["report.html", "report.json", "report.md"]


def _wait_for(uri: str, running: subprocess.Popen[bytes]) -> None:
    """Until the server answers that it is well."""
    for _ in range(240):
        assert running.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail("the server did not begin to answer")
