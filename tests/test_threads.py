"""How many threads processes of quantkit have, and how these wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.system import threads

CLI = """
import json, os, sys
before = dict(os.environ)
import quantkit.cli
quantkit.cli.app = lambda: None
imported = dict(os.environ)
quantkit.cli.main()
changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
print(json.dumps([imported == before, changed]))
import torch
"""


def group(root: Path, lines: str, **limits: str) -> Path:
    """A machine whose process is in the control groups of ``lines``; limits by path, of which ``__`` is a slash."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, limit in limits.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name.replace("cpu_", "cpu.")).write_text(limit + "\n")
    return root


@pytest.mark.parametrize(
    ("lines", "limits", "quota"),
    [
        ("0::/\n", {"cpu_max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu_max": "max 100000"}, None),
        ("0::/a/b\n", {"a__b__cpu_max": "max 100000", "a__cpu_max": "300000 100000"}, 3.0),
        ("0::/a/b\n", {"a__b__cpu_max": "200000 100000", "a__cpu_max": "300000 100000"}, 2.0),
        ("0::/named/outside\n", {"cpu_max": "400000 100000"}, 4.0),
        ("4:memory:/\n3:cpu,cpuacct:/x\n", {"cpu__cpu_cfs_quota_us": "50000", "cpu__cpu_cfs_period_us": "100000"}, 0.5),
        ("1:cpu:/\n0::/\n", {"cpu__cpu_cfs_quota_us": "-1", "cpu__cpu_cfs_period_us": "100000"}, None),
        ("3:cpuset:/\n", {"cpu__cpu_cfs_quota_us": "50000", "cpu__cpu_cfs_period_us": "100000"}, None),
    ],
)
def test_the_quota_of_a_container_is_read(
    tmp_path: Path, lines: str, limits: dict[str, str], quota: float | None
) -> None:
    assert threads.quota_of(group(tmp_path, lines, **limits)) == quota


def test_no_control_groups_are_no_quota(tmp_path: Path) -> None:
    assert threads.quota_of(tmp_path) is None


@pytest.mark.parametrize(("quota", "processors"), [(None, 8), (0.2, 1), (1.5, 2), (3.0, 3), (64.0, 8)])
def test_threads_keep_within_binding_and_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, processors: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.setattr(threads, "quota_of", lambda: quota)
    assert threads.processors() == threads.count({}) == processors
    assert threads.variables({}).get("OMP_NUM_THREADS") == (None if processors == 8 else str(processors))


@pytest.mark.parametrize(("asked", "count"), [("3", 3), ("16", 16), ("4,2", 4), ("0", 2), ("many", 2), ("", 2)])
def test_omp_num_threads_is_respected(monkeypatch: pytest.MonkeyPatch, asked: str, count: int) -> None:
    monkeypatch.setattr(threads, "processors", lambda: 2)
    assert threads.count({"OMP_NUM_THREADS": asked}) == count
    assert threads.variables({"OMP_NUM_THREADS": asked})["OMP_NUM_THREADS"] == asked


@pytest.mark.parametrize("name", threads.WAITING)
def test_who_says_how_threads_wait_is_heard(name: str) -> None:
    assert threads.variables({})["OMP_WAIT_POLICY"] == "PASSIVE"
    told = threads.variables({name: "x", "A_SECRET": "y"})
    assert {key: told[key] for key in told if key != "OMP_NUM_THREADS"} == {name: "x"}


def test_the_command_line_sets_them_before_openmp_is_loaded_and_an_import_sets_nothing() -> None:
    kept = {name: value for name, value in os.environ.items() if name not in (threads.COUNT, *threads.WAITING)}
    told = {**kept, "OMP_DISPLAY_ENV": "TRUE"}
    done = subprocess.run([sys.executable, "-c", CLI], env=told, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [True, threads.variables({})]
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr  # as OpenMP says when it is loaded
