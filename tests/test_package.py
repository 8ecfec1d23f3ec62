"""What is built and published: the checks of ``make package`` see what is wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path

from tests import package_check
from tests.large_files import ROOT
from tests.package_check import SDIST_TOP, sdist_faults, wheel_faults

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_a_source_distribution_with_too_much_or_too_little_is_refused() -> None:
    good = dict.fromkeys(SDIST_TOP, 10)
    assert sdist_faults(good) == []
    foreign = {**good, "reports/sample/report.html": 10, "tests/tiny.py": 1}
    assert sdist_faults(foreign) == ["the sdist also holds: reports, tests"]
    without = {name: size for name, size in good.items() if name != "LICENSE"}
    assert sdist_faults(without) == ["the sdist lacks: LICENSE"]
    large = {**good, "quantkit/a.json": 1_000_001}
    assert sdist_faults(large) == ["the sdist holds files over 1 MB: quantkit/a.json"]


def test_a_wheel_holds_the_package_and_the_calibration_data_alone() -> None:
    tracked = [Path(name) for name in ("README.md", "tests/tiny.py", "quantkit/py.typed", "calib_data/c4.yaml")]
    good = dict.fromkeys(("quantkit/py.typed", "quantkit/calib_data/c4.yaml", "quantkit_ptq-1.dist-info/METADATA"), 1)
    assert wheel_faults(good, tracked) == []
    assert wheel_faults({**good, "tests/tiny.py": 1}, tracked) == ["the wheel also holds: tests/tiny.py"]
    assert wheel_faults(dict.fromkeys(list(good)[1:], 1), tracked) == ["the wheel lacks: quantkit/py.typed"]
    assert wheel_faults({}, []) == ["the wheel lacks: quantkit/py.typed"]


def test_the_version_comes_from_tags() -> None:
    assert PROJECT["project"]["dynamic"] == ["readme", "urls", "version"]
    assert PROJECT["tool"]["hatch"]["version"] == {"source": "vcs", "fallback-version": package_check.FALLBACK}
    assert "export-subst" in (ROOT / ".gitattributes").read_text(encoding="utf-8")
    assert "$Format:%(describe" in (ROOT / ".git_archival.txt").read_text(encoding="utf-8")


def test_ci_builds_the_package_and_tries_it() -> None:
    assert "make package" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {"--help", "models", "matrix", "quantize"} <= {arguments[0] for arguments in package_check.COMMANDS}
