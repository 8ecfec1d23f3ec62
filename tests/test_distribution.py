"""What pip calls this package: install lines in text and code are checked, and strangers of the same name are told."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import get_args

import pytest
from packaging.requirements import InvalidRequirement, Requirement

from quantkit.system import distribution
from quantkit.system.distribution import NAME, Extra, in_the_way, install_line, own_version, upgrade_line, warnings

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
DEVELOPERS = {"docs", "notebook", "test"}
"""Extras for work on quantkit itself."""
WRITTEN = (".md", ".py", ".yml", ".yaml", ".toml", ".ipynb", ".cfg", ".txt", ".sh", "")
INSTALLS = re.compile(r"(?:pip|pip3|uv|uvx|pipx)(?:['\"], ['\"]| )(?:tool |pip )?(?:install|add|run)\b([^`\n]*)")


def texts() -> Iterator[tuple[str, str]]:
    """The files of the repository that people or programs read, less recorded output and fuzzing inputs."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        path = ROOT / name
        skipped = name.startswith(("tests/fuzz/corpus/", "reports/")) or path == Path(__file__)
        if path.suffix in WRITTEN and path.is_file() and not skipped:
            yield name, path.read_text(encoding="utf-8")


def wrong(text: str) -> list[str]:
    """What a text tells people to install that is not ours under its name, or an extra that there is not."""
    joined = re.sub(r"\s*\n[ \t]*(?:#[ \t]*)?", " ", text)
    bracketed = re.findall(r"(?<![\w.-])(quantkit(?:-ptq)?|\.)\\?\[([\w, -]+)\\?\](?=['\"`\s,.;:)]|$)", joined)
    names_extras = [(name, extra) for name, extras in bracketed for extra in re.split(r",\s*", extras)]
    found = [f"{name}[{extra}]" for name, extra in names_extras if name == "quantkit" or extra not in EXTRAS]
    for line in INSTALLS.findall(text):
        found += [word for word in re.split(r"[\s'\"`();]+", line) if word.rstrip(".,") in {"quantkit", "llm-quantkit"}]
    return found


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout of git")
def test_every_install_line_names_this_distribution_and_extras_that_there_are() -> None:
    read = dict(texts())
    assert {"README.md", "docs/plugins.md", "docs/schedule/regression.yml", "pyproject.toml"} <= set(read)
    assert {name: lines for name, text in read.items() if (lines := wrong(text))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "pip install quantkit",
        "`pip install --upgrade quantkit`.",
        "uv tool install quantkit",
        "pip install llm-quantkit",
        "(`pip install\n'quantkit[tasks]'`)",
        "pip install 'quantkit-ptq[plots]'",
        "pip install -e '.[tests]'",
        "needs quantkit[tasks]",
        "[sys.executable, '-m', 'pip', 'install', 'quantkit']",
        r"match=r'quantkit-ptq\[plot\]'",
    ],
)
def test_a_wrong_install_line_is_found(text: str) -> None:
    assert wrong(text)
    assert wrong("pip install -e '.[cuda]' and pip install 'quantkit-ptq[tasks,vision]'\nquantkit run") == []


def test_the_name_and_the_extras_in_code_are_those_of_the_project() -> None:
    assert PROJECT["name"] == NAME
    assert PROJECT["scripts"] == {"quantkit": "quantkit.cli:main"}
    assert set(get_args(Extra)) <= EXTRAS
    asked = Requirement(next(each for each in PROJECT["optional-dependencies"]["test"] if each.startswith("quantkit")))
    assert (asked.name, asked.extras - EXTRAS) == (NAME, set())
    assert install_line("tasks") == f"pip install '{NAME}[tasks]'"


def test_the_page_lists_every_extra_with_what_it_brings() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\| ((?:`[\w-]+`(?:, )?)+) \|$", page, re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    brought = {name: [Requirement(each).name for each in given] for name, given in extras.items()}
    assert {name: sorted(re.findall(r"[\w-]+", packages)) for name, packages in rows.items()} == {
        name: sorted(packages) for name, packages in brought.items() if name not in DEVELOPERS
    }
    assert all(f"`{name}`" in page for name in DEVELOPERS)


def remedies() -> Iterator[str]:
    """The package, as pip takes it, of every install line that is a plain string in the code."""
    for path in sorted((ROOT / "quantkit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                for line in re.findall(r"^pip install ([^()]+)$", node.value):
                    yield from (
                        word.strip("'") for word in line.split() if not word.startswith("-") and word.strip("'")
                    )


def test_install_lines_in_code_are_requirements_that_pip_can_read() -> None:
    found = sorted(set(remedies()))
    assert found
    for each in found:
        try:
            named = Requirement(each).name
        except InvalidRequirement:
            pytest.fail(f"pip cannot read '{each}'")
        assert named != "quantkit"


class Made(Distribution):
    """A distribution of which only some files are there."""

    def __init__(self, name: str, **files: str) -> None:
        self._files = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n", **files}

    def read_text(self, filename: str) -> str | None:
        return self._files.get(filename)

    def locate_file(self, path: object) -> Path:
        return Path("/nowhere") / str(path)


def installed(monkeypatch: pytest.MonkeyPatch, *there: Made) -> None:
    """An environment of these distributions alone."""
    held = {each.metadata["Name"]: each for each in there}

    def found(name: str) -> Distribution:
        if name not in held:
            raise PackageNotFoundError(name)
        return held[name]

    scripts = [point for each in there for point in each.entry_points]
    monkeypatch.setattr(distribution, "distribution", found)
    monkeypatch.setattr(distribution, "version", lambda name: found(name).version)
    monkeypatch.setattr(distribution, "entry_points", lambda group: [each for each in scripts if each.group == group])


COMMAND = {"entry_points.txt": "[console_scripts]\nquantkit = quantkit.cli:main\n"}


def test_strangers_of_the_same_name_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, package, command = Made(NAME, **COMMAND), Made("quantkit"), Made("llm-quantkit", **COMMAND)
    other = Made("another", **{"entry_points.txt": "[console_scripts]\nanother = a:b\n"})
    installed(monkeypatch, ours, other)
    assert warnings() == []
    installed(monkeypatch, ours, package, command, other)
    assert in_the_way() == ["llm-quantkit", "quantkit"]
    assert f"pip uninstall llm-quantkit {NAME}, then install {NAME} again" in warnings()[0]


def test_an_editable_checkout_under_another_name_is_no_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = {"url": "file:///home/me/quantkit", "dir_info": {"editable": True}}
    installed(monkeypatch, Made("quantkit", **COMMAND, **{"direct_url.json": json.dumps(origin)}))
    assert in_the_way() == []


def test_the_command_warns_at_its_start(tmp_path: Path) -> None:
    folder = tmp_path / "llm_quantkit-0.29.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-quantkit\nVersion: 0.29\n")
    (folder / "entry_points.txt").write_text(COMMAND["entry_points.txt"])
    code = (
        f"import sys\nsys.path.append({str(tmp_path)!r})\nsys.argv = ['quantkit', '--version']\n"
        "import quantkit.cli\nquantkit.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"quantkit \S+\n", done.stdout)
    assert "warning: the distribution 'llm-quantkit'" in done.stderr


def test_the_version_is_that_of_this_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, Made(NAME), Made("quantkit"))
    assert (own_version(), distribution.version_of("quantkit"), distribution.version_of(NAME)) == ("1.5",) * 3
    installed(monkeypatch, Made("quantkit"))
    assert own_version() == distribution.UNKNOWN


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        (None, f"pip install --upgrade {NAME}"),
        (
            {"url": "https://host/q.git", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            f"pip install --upgrade '{NAME} @ git+https://host/q.git'",
        ),
        ({"url": "file:///home/q", "dir_info": {"editable": True}}, "upgrade the checkout in /home/q"),
    ],
)
def test_an_upgrade_comes_from_where_quantkit_came(
    origin: dict[str, object] | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {} if origin is None else {"direct_url.json": json.dumps(origin)}
    installed(monkeypatch, Made(NAME, **files))
    assert upgrade_line().startswith(line)
