from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.errors import OutputError
from quantkit.evaluation import stage as scores
from quantkit.system import events
from quantkit.system.events import EventLog, event_log
from quantkit.system.progress import Several
from tests.runs import Notebook, recipe_data, score_here, write_recipe, write_records
from tests.tiny import make_model


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_events_carry_what_an_observer_is_told() -> None:
    stream = io.StringIO()
    log = EventLog(stream)
    log.stage("source: x")
    log.progress("block", 0, 2)
    log.note("naïve")
    found = lines(stream.getvalue())
    assert [event["event"] for event in found] == ["stage", "progress", "note"]
    assert found[0]["title"] == "source: x"
    assert (found[1]["step"], found[1]["done"], found[1]["total"]) == ("block", 0, 2)
    assert found[2]["text"] == "naïve"
    assert all(event["time"].endswith("+00:00") and event["elapsed"] >= 0 for event in found)


def test_progress_is_thinned_out_but_for_the_first_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PROGRESS_EVERY", 3600.0)
    stream = io.StringIO()
    log = EventLog(stream)
    for step in ("load", "block"):
        for done in range(101):
            log.progress(step, done, 100)
    found = [(event["step"], event["done"]) for event in lines(stream.getvalue())]
    assert found == [("load", 0), ("load", 100), ("block", 0), ("block", 100)]


def test_a_log_is_appended_to_and_says_how_it_ended(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "events.jsonl"
    with event_log(file, name="a") as log:
        log.note("one")
    with pytest.raises(KeyError), event_log(file, name="b"):
        raise KeyError("gone")
    found = lines(file.read_text(encoding="utf-8"))
    assert [event["event"] for event in found] == ["start", "note", "start", "error"]
    assert [event["name"] for event in found if event["event"] == "start"] == ["a", "b"]
    assert (found[-1]["kind"], found[-1]["text"]) == ("KeyError", "'gone'")


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(OutputError, match="logs"), event_log(tmp_path / "logs" / "events.jsonl"):
        pass


def test_several_observers_are_told_the_same() -> None:
    first, second = Notebook(), Notebook()
    both = Several(first, second)
    both.stage("s")
    both.progress("block", 1, 2)
    both.note("n")
    for each in (first, second):
        assert (each.stages, each.steps, each.notes) == (["s"], [("block", 1, 2)], ["n"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def test_a_run_as_json_lines(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "run_job", score_here)
    out = tmp_path / "run"
    variants: list[dict[str, Any]] = [
        {"name": "int4", "method": "rtn"},
        {"name": "none", "method": "rtn", "ignore": ["."]},
    ]
    data = recipe_data(model, write_records(tmp_path / "records.jsonl"), out, variants, gates=["size_bytes <= 1B"])
    result = CliRunner().invoke(app, ["run", "--json", str(write_recipe(tmp_path / "r.yaml", data))])
    assert result.exit_code == 1
    found = lines(result.stdout)
    assert found[0]["event"] == "start"
    assert any(event["event"] == "stage" and event["title"].startswith("evaluate: int4") for event in found)
    end = found[-1]
    assert (end["event"], end["status"]) == ("end", "failed")
    assert end["variants"] == {"int4": "ok", "none": "failed"}
    assert end["gates_missed"] == ["int4: size_bytes <= 1B", "none: size_bytes <= 1B"]
    assert Path(end["report"]).is_file()
    kept = lines((out / "logs" / "events.jsonl").read_text(encoding="utf-8"))
    assert (kept[0]["event"], kept[0]["name"]) == ("start", "demo")
    assert (kept[-1]["event"], kept[-1]["status"]) == ("end", "failed")


def test_a_run_that_cannot_begin_ends_its_lines_with_the_error(tmp_path: Path) -> None:
    records = write_records(tmp_path / "records.jsonl")
    data = recipe_data(tmp_path / "absent", records, tmp_path / "run", [{"name": "int4", "method": "rtn"}])
    result = CliRunner().invoke(app, ["run", "--json", str(write_recipe(tmp_path / "r.yaml", data))])
    assert result.exit_code == 2
    found = lines(result.stdout)
    assert found[-1]["event"] == "error"
    assert "absent" in found[-1]["text"]
    assert result.stderr.startswith("error: ")
