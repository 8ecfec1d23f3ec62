"""The files that run checks on a schedule: cron, systemd, GitHub Actions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from quantkit.cli import app
from quantkit.run_history import History
from tests.runs import recipe_data, write_recipe

SCHEDULE = Path(__file__).parent.parent / "docs" / "schedule"
SCRIPT = Path(sys.executable).with_name("quantkit")


def cron_command() -> str:
    lines = [line for line in (SCHEDULE / "quantkit.cron").read_text().splitlines() if line and line[0] != "#"]
    settings, (line,) = lines[:-1], lines[-1:]
    assert settings == ["SHELL=/bin/sh"]
    fields = line.split(" ", 5)
    assert fields[:5] == ["0", "6", "*", "*", "1"]
    assert "%" not in fields[5], "cron makes a line break of it"
    return fields[5]


@pytest.fixture
def home(tmp_path: Path, model: Path, records: Path) -> Path:
    """A home folder with what the files expect in it."""
    folder = tmp_path / "quantization"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "quantkit").symlink_to(SCRIPT)
    about = {"texts": ["prose"], "context_length": 32, "max_tokens": 96, "metrics": ["perplexity"], "device": "cpu"}
    data = recipe_data(model, records, Path("reports/weekly"), [{"name": "rtn", "method": "rtn"}], evaluation=about)
    write_recipe(folder / "weekly.yaml", data | {"name": "weekly", "gates": ["perplexity <= 1e6"]})
    return tmp_path


@pytest.mark.skipif(not SCRIPT.is_file(), reason="the command is not installed")
def test_the_line_of_cron_runs_in_the_environment_that_cron_gives(home: Path) -> None:
    given = {"HOME": str(home), "LOGNAME": "user", "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"}
    environment = [f"{name}={value}" for name, value in given.items()]
    command = ["env", "-i", *environment, "/bin/sh", "-c", cron_command()]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    log = home / "quantization" / "reports" / "check.log"
    assert done.returncode == 0, log.read_text(encoding="utf-8")
    assert (done.stdout, done.stderr) == ("", "")
    assert "passed: 1 gate on 1 variant" in log.read_text(encoding="utf-8")
    (run,) = History(home / "quantization" / "reports" / "history.sqlite").runs()
    assert (run.kind, run.verdict) == ("check", "passed")
    check = json.loads((home / "quantization" / "reports" / "weekly" / "check.json").read_text())
    assert check["exit_code"] == 0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
@pytest.mark.parametrize("unit", ["quantkit-check.service", "quantkit-check.timer"])
def test_systemd_finds_nothing_wrong_with_its_units(home: Path, unit: str) -> None:
    for name in ("quantkit-check.service", "quantkit-check.timer"):
        text = (SCHEDULE / name).read_text()
        (home / name).write_text(text.replace("%h", str(home)))
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{home}:", "XDG_RUNTIME_DIR": str(home)}
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", "--man=no", str(home / unit)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert [line for line in done.stderr.splitlines() if "quantkit" in line] == []
    assert done.returncode == 0, done.stderr


def workflow() -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load((SCHEDULE / "regression.yml").read_text())
    return found


def test_the_workflow_has_what_github_asks_for() -> None:
    content = workflow()
    assert set(content) == {"name", True, "permissions", "concurrency", "jobs"}
    (job,) = content["jobs"].values()
    assert content[True]["schedule"] == [{"cron": "0 6 * * 1"}]
    assert content["permissions"] == {"contents": "read", "actions": "read"}
    assert job["timeout-minutes"] < 360
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert set(step) <= {"name", "uses", "run", "with", "if", "env"}
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/none@v1"))


def test_the_workflow_keeps_the_history_though_the_check_fails() -> None:
    (job,) = workflow()["jobs"].values()
    names = [step.get("name") for step in job["steps"]]
    assert (
        names.index("Fetch the history that the last run left") < names.index("Check") < names.index("Keep the history")
    )
    kept = job["steps"][names.index("Keep the history")]
    assert kept["if"].startswith("${{ always()")
    assert kept["with"]["path"] == "reports/history.sqlite"


def test_the_scripts_of_the_workflow_are_shell_and_its_commands_exist() -> None:
    (job,) = workflow()["jobs"].values()
    commands = set(getattr(typer.main.get_command(app), "commands"))  # noqa: B009 - of click's Group
    used = set()
    for step in job["steps"]:
        script = step.get("run", "")
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        used |= set(re.findall(r"^quantkit (\w+)", script, re.MULTILINE))
    assert used == {"check", "accept"}
    assert used <= commands
