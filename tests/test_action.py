"""The GitHub Action and the workflows: what GitHub would read of them, and the scripts that they run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.large_files import ROOT

ACTION = ROOT / "action.yml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RECIPE = "name: weekly\nmodel: {source: ./my-model}\nvariants:\n  - name: int4\ngates: [perplexity +1 %]\n"


def read(path: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def steps(path: Path) -> Iterator[dict[str, Any]]:
    """The steps of a workflow or of the action."""
    content = read(path)
    for job in [content["runs"]] if "runs" in content else content["jobs"].values():
        yield from job["steps"]


@pytest.mark.parametrize("path", [ACTION, *WORKFLOWS], ids=lambda path: path.name)
def test_others_actions_are_pinned_by_commit_and_scripts_take_nothing_from_expressions(path: Path) -> None:
    used = re.findall(r"uses: *(.*)", path.read_text(encoding="utf-8"))
    assert [line for line in used if not re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line)] == []
    for step in steps(path):
        assert ("uses" in step) != ("run" in step)
        script = step.get("run", "")
        assert "${{" not in script, "an expression in a script is code of whoever can set it: give it in env"
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {name for step in steps(path) for name in re.findall(r"\bmake ([\w-]+)", step.get("run", ""))} <= targets


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_read_alone_and_keep_no_secret(path: Path) -> None:
    assert read(path)["permissions"] == {"contents": "read"}
    assert "secrets." not in path.read_text(encoding="utf-8")
    for step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_a_release_is_built_attested_and_published_by_jobs_that_may_do_no_more() -> None:
    jobs = read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    needs = {name: job.get("needs") for name, job in jobs.items()}
    assert needs == {"build": None, "attest": "build", "publish": "attest", "release": "publish"}
    allowed = {name: job.get("permissions", {}) for name, job in jobs.items()}
    assert [name for name in allowed if allowed[name].get("id-token") == "write"] == ["attest", "publish"]
    assert [name for name in allowed if allowed[name].get("contents") == "write"] == ["release"]
    assert jobs["publish"]["environment"]["name"] == "pypi"
    assert "uv publish --trusted-publishing always dist/*" in [step.get("run") for step in jobs["publish"]["steps"]]


def test_a_release_without_its_part_of_the_changelog_is_refused(tmp_path: Path) -> None:
    build = read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]["build"]
    (script,) = (step["run"] for step in build["steps"] if "changelog" in step.get("name", ""))
    (tmp_path / "dist").mkdir()
    for end in (".tar.gz", "-py3-none-any.whl"):
        (tmp_path / "dist" / f"quantkit_ptq-1.2.0{end}").touch()

    def code(tag: str, changelog: str) -> int:
        (tmp_path / "CHANGELOG.md").write_text(changelog)
        environment = {**os.environ, "GITHUB_REF_NAME": tag}
        return subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=environment, check=False).returncode

    written = "# Changes\n\n## [Unreleased]\n\n## [1.2.0] - 2027-01-01\n\n### Added\n\n- It.\n\n## [1.1.0]\n\n- Old.\n"
    assert code("v1.2.0", written) == 0
    assert (tmp_path / "notes.md").read_text().split() == ["###", "Added", "-", "It."]
    assert code("v1.2.0", "# Changes\n\n## [Unreleased]\n\n- It.\n") != 0
    assert code("v1.3.0", written.replace("1.2.0", "1.3.0")) != 0


def test_the_action_declares_what_it_uses_and_tells() -> None:
    content, text = read(ACTION), ACTION.read_text(encoding="utf-8")
    assert content["runs"]["using"] == "composite"
    assert {"name", "description", "inputs", "outputs", "runs"} <= set(content)
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(content["inputs"])
    assert all(step.get("shell") == "bash" for step in steps(ACTION) if "run" in step)
    for script in re.findall(r"\$GITHUB_ACTION_PATH/([\w./]+)", text):
        assert (ROOT / script).is_file()
    page = (ROOT / "docs" / "action.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE))
    assert named == set(content["inputs"]) | set(content["outputs"])


class Job:
    """A job of GitHub's with commands that answer as they are told to."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._patch = folder, patch
        (folder / "bin").mkdir()
        (folder / "weekly.yaml").write_text(RECIPE)
        patch.chdir(folder)
        patch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        self.set(
            GITHUB_OUTPUT="output", GITHUB_STEP_SUMMARY="summary", INPUT_RECIPE="weekly.yaml", INPUT_ACCEPT="false"
        )

    def set(self, **variables: str) -> None:
        for name, value in variables.items():
            self._patch.setenv(name, value)

    def command(self, name: str, script: str) -> None:
        """A command that notes its arguments in a file of its name, and runs a script."""
        place = self.folder / "bin" / name
        place.write_text(f'#!/bin/bash\necho "$@" >> {self.folder / name}\n{script}\n')
        place.chmod(0o755)

    def called(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines()

    def outputs(self) -> dict[str, str]:
        lines = (self.folder / "output").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


def program() -> Any:
    """``action/steps.py`` as a module."""
    spec = importlib.util.spec_from_file_location("steps", ROOT / "action" / "steps.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VERDICTS = {0: "passed", 1: "regressed", 2: "unknown"}


@pytest.mark.parametrize(
    ("fail_on", "codes"),
    [("unknown", {0: 0, 1: 1, 2: 2}), ("regressed", {0: 0, 1: 1, 2: 0}), ("never", {0: 0, 1: 0, 2: 0})],
)
def test_the_verdict_becomes_outputs_and_fails_the_job_as_asked(fail_on: str, codes: dict[int, int], job: Job) -> None:
    job.set(INPUT_FAIL_ON=fail_on)
    steps = program()
    for code, expected in codes.items():
        told = json.dumps({"verdict": VERDICTS[code], "summary": "int4: one\nline", "metrics": "x" * 100_000})
        (job.folder / "told").write_text(told)
        job.command("quantkit", f"echo progress >&2; cat told; exit {code}")
        assert steps.check() == expected
        outputs = job.outputs()
        assert outputs == {
            "exit-code": str(code),
            "verdict": VERDICTS[code],
            "summary": "int4: one line",
            "folder": "reports/weekly",
            "history": "reports/history.sqlite",
        }
    assert set(job.called("quantkit")) == {"check --json weekly.yaml"}
    assert not (job.folder / "summary").exists(), "quantkit itself writes the summary of a check"


def test_a_check_that_cannot_run_fails_and_says_why(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    job.set(INPUT_FAIL_ON="regressed")
    job.command("quantkit", "echo 'error: no such model (check the path)' >&2; exit 2")
    assert program().check() == 2
    assert (job.outputs()["verdict"], job.outputs()["summary"]) == ("none", "error: no such model (check the path)")
    assert "no such model" in (job.folder / "summary").read_text()
    assert "::error title=quantkit check::error: no such model" in capfd.readouterr().out
    job.set(INPUT_FAIL_ON="never")
    assert program().check() == 0
    job.set(INPUT_FAIL_ON="regressed", INPUT_RECIPE="none.yaml")
    (job.folder / "output").unlink()
    assert program().check() == 2
    assert set(job.outputs()) == {"exit-code", "verdict", "summary"}, "a recipe that cannot be read has no folder"
    job.set(INPUT_FAIL_ON="sometimes")
    assert program().check() == 2


def test_the_newest_run_is_accepted_instead_where_asked(job: Job) -> None:
    job.set(INPUT_FAIL_ON="unknown", INPUT_ACCEPT="true")
    job.command("quantkit", "echo 'run 3 of weekly is the reference of int4'")
    assert program().check() == 0
    assert job.called("quantkit") == ["accept latest --recipe weekly.yaml"]
    assert job.outputs()["verdict"] == "accepted"
    assert "run 3 of weekly" in (job.folder / "summary").read_text()


def test_the_history_of_the_last_run_is_put_where_the_recipe_has_it(job: Job) -> None:
    job.set(INPUT_HISTORY="quantkit-history", GITHUB_REPOSITORY="o/n")
    job.command("gh", 'if [ "$1" = api ]; then echo 77; fi')
    assert program().history() == 0
    assert job.called("gh") == [
        "api repos/o/n/actions/artifacts?name=quantkit-history&per_page=1 --jq "
        ".artifacts[0] | select(.expired == false) | .workflow_run.id",
        "run download 77 --repo o/n --name quantkit-history --dir reports",
    ]
    job.command("gh", "true")
    assert program().history() == 0
    assert len(job.called("gh")) == 3


def test_the_action_installs_the_quantkit_of_its_own_commit(job: Job) -> None:
    job.command("python", "true")
    job.command("quantkit", "true")
    job.set(GITHUB_ACTION_PATH="/actions/own", INPUT_TORCH="cpu", INPUT_EXTRAS="llama-cpp,tasks")
    install = ["bash", str(ROOT / "action" / "install.sh")]
    subprocess.run(install, check=True)
    job.set(INPUT_TORCH="pypi", INPUT_EXTRAS="")
    subprocess.run(install, check=True)
    assert job.called("python") == [
        "-m pip install torch --index-url https://download.pytorch.org/whl/cpu",
        "-m pip install /actions/own[llama-cpp,tasks]",
        "-m pip install /actions/own",
    ]
    job.set(INPUT_TORCH="rocm")
    refused = subprocess.run(install, stdout=subprocess.PIPE, text=True, check=False)
    assert (refused.returncode, "must be cpu, pypi or none" in refused.stdout) == (2, True)
