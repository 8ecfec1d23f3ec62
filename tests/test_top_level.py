"""The top of the repository: its data in a wheel and in a checkout, what git keeps out, and how tests are timed."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import quantkit
from quantkit import records
from tests import large_files

ROOT = Path(__file__).parent.parent
PACKAGE = Path(quantkit.__file__).parent
READS = """
import json
from quantkit import records
found = records.load("instructions_mini")
print(json.dumps([str(records.named.FOLDER), records.dataset_names(), len(found.records)]))
"""


def hooks() -> dict[str, dict[str, str]]:
    """The pre-commit hooks by id."""
    found = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    return {hook["id"]: hook for repository in found for hook in repository["hooks"]}


def read_from(folder: Path) -> list[object]:
    """What the package that lies in ``folder`` reads of its registry."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", READS], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    found: list[object] = json.loads(done.stdout)
    return found


def test_an_installed_wheel_and_a_checkout_find_the_calibration_data(tmp_path: Path) -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    ignored = shutil.ignore_patterns("__pycache__")
    names, count = records.dataset_names(), len(records.load("instructions_mini").records)
    installed, checkout = tmp_path / "site-packages", tmp_path / "checkout"
    for source, place in {**{name: name for name in wheel["packages"]}, **wheel["force-include"]}.items():
        shutil.copytree(ROOT / source, installed / place, ignore=ignored)
    shutil.copytree(PACKAGE, checkout / "quantkit", ignore=ignored)
    shutil.copytree(ROOT / "calib_data", checkout / "calib_data")
    assert read_from(installed) == [str(installed / "quantkit" / "calib_data"), names, count]
    assert read_from(checkout) == [str(checkout / "calib_data"), names, count]


def test_the_page_of_the_calibration_data_names_each_set_with_its_licence() -> None:
    page = (ROOT / "calib_data" / "README.md").read_text()
    rows = dict(re.findall(r"^\| \[`(\w+)`\].*\| ([^|]+) \|$", page, re.MULTILINE))
    assert rows == {name: records.named_dataset(name).licence for name in records.dataset_names()}
    listed = {path.name for path in (ROOT / "calib_data").iterdir()}
    assert listed == {"README.md", "instructions_mini.jsonl", *(f"{name}.yaml" for name in rows)}


def test_files_over_a_megabyte_are_refused(tmp_path: Path) -> None:
    def checked(*names: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *hooks()["no-large-files"]["entry"].split()[1:], *names]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(large_files.LIMIT))
    large.write_bytes(bytes(large_files.LIMIT + 1))
    assert checked(str(small)).returncode == 0
    refused = checked(str(small), str(large))
    assert (refused.returncode, refused.stderr.strip()) == (1, f"{large}: 1,000,001 bytes, and 1,000,000 are allowed")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout of git")
def test_what_git_tracks_is_small_and_has_no_report_but_the_sample() -> None:
    tracked = large_files.tracked(ROOT)
    assert large_files.too_large(tracked) == []
    assert ROOT / "pyproject.toml" in tracked
    ignored = ["reports/run/report.json", "reports/history.sqlite", "a.whl", "reports/run/variants/a/model.safetensors"]
    kept = ["reports/README.md", "reports/sample/report.html", "calib_data/c4.yaml"]
    told = subprocess.run(
        ["git", "check-ignore", "--no-index", *ignored, *kept], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert told.stdout.split() == ignored


def test_the_sample_report_is_there_and_small() -> None:
    folder = ROOT / "reports"
    linked = re.findall(r"\]\(([^)#]+)\)", (folder / "README.md").read_text())
    assert all((folder / target).exists() for target in linked)
    sample = {path.name: path.stat().st_size for path in (folder / "sample").iterdir()}
    assert {"report.html", "report.md", "divergence.svg"} <= set(sample)
    assert sum(sample.values()) < 300_000


def test_hooks_refuse_wheels_and_pickles() -> None:
    for name, hook in (("atheris-3.0.0-cp311.whl", "no-wheels"), ("model/pytorch_model.bin", "no-pickles")):
        assert hooks()[hook]["language"] == "fail"
        assert re.search(hooks()[hook]["files"], name)
    assert "large_files" in (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]


def test_slow_files_are_listed_with_their_time(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from tests.slow_files import SlowFiles\n\n"
        "def pytest_configure(config):\n    config.pluginmanager.register(SlowFiles(least=0.5))\n"
    )
    (tmp_path / "test_slow.py").write_text(
        "import time\nimport pytest\n\n@pytest.fixture\ndef late():\n    time.sleep(0.4)\n\n"
        "@pytest.mark.parametrize('time_', [1, 2])\ndef test_it(late, time_):\n    time.sleep(0.1)\n"
    )
    (tmp_path / "test_quick.py").write_text("def test_it():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    (line,) = re.findall(r"^ +([0-9.]+) s  (\S+)$", done.stdout, re.MULTILINE)
    assert line[1] == "test_slow.py"
    assert 1.0 <= float(line[0]) < 5.0


def unexplained(source: str) -> list[int]:
    """Lines of handlers that catch any error, do not raise it again as it is, and say nowhere near why."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and (node.type is None or "Exception" in ast.unparse(node.type).split()):
            near = [lines[node.lineno - 1], lines[node.lineno - 2], lines[node.lineno]]
            if not any("#" in line for line in near):
                found.append(node.lineno)
    return found


def test_whoever_catches_any_error_says_why_in_a_comment() -> None:
    found = {path.relative_to(ROOT): unexplained(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}
    assert unexplained("try:\n    pass\nexcept Exception:\n    pass\n") == [3]
    assert unexplained("try:\n    pass\nexcept Exception:  # a plugin's code\n    pass\n") == []


def test_files_and_modules_that_text_names_are_there() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")]
    written = "\n".join(page.read_text() for page in pages)
    assert [path for path in re.findall(r"`(quantkit/[\w/]+(?:\.py|/))`", written) if not (ROOT / path).exists()] == []
    sources = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    for module, member in re.findall(r":\w+:`~?(quantkit(?:\.[a-z_]+)*)(?:\.([A-Z]\w*))?", sources):
        path = ROOT / Path(*module.split("."))
        owner = path if path.is_dir() or path.with_suffix(".py").is_file() else path.parent  # or a function of it
        assert owner.is_dir() or owner.with_suffix(".py").is_file(), f"{module}.{member}"
