"""A process that was started for a run ends with the run, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from quantkit.evaluation.job import EvaluationJob
from quantkit.evaluation.process import worker_command
from quantkit.recipe import EvaluationSpec
from quantkit.system import worker
from quantkit.system.artifacts import write_json
from quantkit.system.worker import EXIT_ORPHANED, RESULT_FILE
from quantkit.verification.job import VerificationJob
from tests.tiny import make_model

posix = pytest.mark.skipif(os.name != "posix", reason="signals")
CHILD = (
    "import time\nfrom quantkit.system.worker import live_no_longer_than_the_parent as live\nlive()\ntime.sleep(600)"
)
PARENT = (
    "import subprocess, sys, time\n"
    f"child = subprocess.Popen([sys.executable, '-c', {CHILD!r}], stdin=subprocess.PIPE)\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(600)\n"
)
LONG = 30.0
"""Seconds that an orphan may take to start and to end, on a loaded machine."""


def gone(pid: int) -> bool:
    deadline = time.monotonic() + LONG
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@posix
def test_an_orphan_of_a_killed_process_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert psutil.Process(child).status() != psutil.STATUS_ZOMBIE
        parent.send_signal(signal.SIGKILL)
    assert gone(child)


def test_a_process_of_another_interpreter_loads_the_file_by_its_path() -> None:
    code = (
        f"import importlib.util, time\nspec = importlib.util.spec_from_file_location('worker', {worker.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        "module.live_no_longer_than_the_parent()\ntime.sleep(600)"
    )
    alone = subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    _, told = alone.communicate(timeout=4 * LONG)
    assert alone.returncode == EXIT_ORPHANED, told


def test_scoring_ends_with_whoever_waits_for_it(tmp_path: Path) -> None:
    job = EvaluationJob(make_model(tmp_path / "model"), EvaluationSpec.model_validate({}))
    write_json(tmp_path / "job.json", job.to_json())
    command = [*worker_command(), str(tmp_path / "job.json")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, told = child.communicate(timeout=4 * LONG)  # closes its standard input at once
    assert child.returncode == EXIT_ORPHANED, told
    assert not (tmp_path / RESULT_FILE).exists()


@posix
def test_a_runtime_that_is_verified_ends_with_whoever_waits_for_it(tmp_path: Path) -> None:
    job = VerificationJob(tmp_path, "transformers", "cpu", "float32", 8, ((1,),), 0, 1, tmp_path).to_json()
    write_json(tmp_path / "job.json", job)
    works = f"serve([{str(tmp_path / 'job.json')!r}], lambda job, report: __import__('time').sleep({LONG}))"
    command = [sys.executable, "-c", f"from quantkit.system.worker import serve\n{works}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as child:
        _, told = child.communicate(timeout=4 * LONG)
    assert child.returncode == -signal.SIGKILL, told
    assert not (tmp_path / "result.json").exists()
