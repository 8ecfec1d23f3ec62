"""The commands about runs over time, on a history of runs that never were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from quantkit.cli import app
from quantkit.errors import QuantkitError
from quantkit.regression.api import accept, history
from quantkit.run_history import History
from tests.history_records import run, variant


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default history of a folder, with three runs."""
    monkeypatch.chdir(tmp_path)
    found = History(Path("reports/history.sqlite"))
    found.append(run())
    found.append(run(kind="run", verdict=None, status="error", error="no such model", variants=(), baseline=None))
    later = "2026-11-08T06:00:00.000000+00:00"
    found.append(run(started=later, verdict="regressed", variants=(variant(), variant("int8"))))
    return tmp_path / "reports" / "history.sqlite"


def quantkit(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def shown(*arguments: str) -> Any:
    result = quantkit(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_table_has_a_row_for_each_variant_of_each_run(file: Path) -> None:
    result = quantkit("history")
    assert result.exit_code == 0
    rows = [line for line in result.stdout.splitlines() if "2026-11" in line]
    assert len(rows) == 5
    assert "error" in rows[2]
    assert result.stdout.rstrip().endswith("run 2: no such model")
    assert "accepted" not in result.stdout
    assert quantkit("accept", "3", "--variant", "int8").exit_code == 0
    table = quantkit("history").stdout
    assert "int8 *" in table
    assert "* accepted: checks compare with it" in table
    assert "failed" in rows[1]
    assert "regressed" in rows[4]


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ([], [1, 2, 3]),
        (["--last", "1"], [3]),
        (["--status", "error"], [2]),
        (["--since", "2026-11-08"], [3]),
        (["--since", "2026-11-08T07:00:00+01:00"], [3]),
        (["--since", "2026-11-08T09:00"], []),
        (["--variant", "int8"], [1, 3]),
        (["--name", "demo"], [1, 2, 3]),
    ],
)
def test_runs_are_filtered(file: Path, options: list[str], numbers: list[int]) -> None:
    assert [each["id"] for each in shown("history", *options)] == numbers


def test_a_recipe_says_whose_runs_and_where(file: Path, tmp_path: Path) -> None:
    text = "name: {}\nmodel: {{source: x}}\nvariants: [{{name: a}}]\nhistory: {{file: reports/history.sqlite}}\n"
    (tmp_path / "demo.yaml").write_text(text.format("demo"))
    (tmp_path / "other.yaml").write_text(text.format("other"))
    assert len(shown("history", "demo.yaml")) == 3
    assert shown("history", "other.yaml") == []


def test_one_run_is_shown_whole(file: Path) -> None:
    result = quantkit("history", "show", "1")
    assert result.exit_code == 0
    for words in ("run 1: demo, check, passed", "model org/model", "torch 2.13", "kl_divergence.prose.mean = 0.1"):
        assert words in result.stdout
    found = shown("history", "show", "latest")
    assert shown("history", "show") == found
    assert found["id"] == 3
    assert found["variants"][0]["texts"]["prose"]["departures"][0]["token"] == " out"


def test_accepting_says_whose_reference_the_run_is_now(file: Path) -> None:
    result = quantkit("accept", "latest")
    assert (result.exit_code, result.stdout) == (0, "run 3 of demo is the reference of int4, int8\n")
    assert quantkit("accept", "1", "--variant", "int4").stdout == "run 1 of demo is the reference of int4\n"
    found = {each["id"]: list(each["accepted"]) for each in history(file=file)}
    assert found == {1: ["int4"], 2: [], 3: ["int8"]}
    assert "int4 *" in quantkit("history").stdout
    assert accept("3", file=file, variants=["int4"])["accepted"] == ("int4", "int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["accept", "9"], "has no run 9"),
        (["accept", "newest"], "'newest' is not the number of a run (name a number or 'latest')"),
        (["accept", "2"], "run 2 has no finished variant"),
        (["accept", "1", "--variant", "int9"], "did you mean 'int"),
        (["accept", "latest", "--name", "dem"], "did you mean 'demo'"),
        (["accept", "1", "--file", "nowhere.sqlite"], "there is no history nowhere.sqlite"),
        (["history", "--file", "nowhere.sqlite"], "there is no history nowhere.sqlite"),
        (["history", "--since", "monday"], "'monday' is not a date"),
        (["history", "nowhere.yaml"], "cannot read recipe nowhere.yaml"),
        (["history", "show", "77"], "has no run 77"),
        (["check", "nowhere.yaml"], "cannot read recipe nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(file: Path, arguments: list[str], message: str) -> None:
    result = quantkit(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_functions_are_what_the_commands_do(file: Path) -> None:
    assert history(last=1, file=file)[0]["id"] == 3
    with pytest.raises(QuantkitError, match="not the number of a run"):
        accept("-1", file=file)
