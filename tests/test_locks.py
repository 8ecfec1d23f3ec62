"""One writer an output, shown with real processes: each tells when it holds a lock, and ends when it is told to."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quantkit.errors import OutputError
from quantkit.system.artifacts import new_folder, write_stage
from quantkit.system.locks import alone, held, holds, lock_file
from tests.runs import hidden_names

HOLD = """
import sys
from pathlib import Path
from quantkit.errors import OutputError
from quantkit.system.locks import held
try:
    with held(Path(sys.argv[1]), "a test"):
        print("held", flush=True)
        sys.stdin.readline()
except OutputError as error:
    print(error, flush=True)
"""
CONTEND = """
import sys
from pathlib import Path
from quantkit.errors import OutputError
from quantkit.system.locks import held
count, tries = Path(sys.argv[2]), 0
while tries < 60:
    try:
        with held(Path(sys.argv[1]), "counting"):
            count.write_text(str(int(count.read_text()) + 1))
        tries += 1
    except OutputError:
        pass
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of ``path``, or was refused, when the block begins."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout
    return child.stdout.readline().strip()


def test_two_processes_with_one_output_are_told_apart(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "out"
    with holder(place) as child:
        assert said(child) == "held"
        with pytest.raises(OutputError) as caught, held(place, "the same"):
            pass
        line = str(caught.value)
        assert f"{place} is being written by process {child.pid} on {os.uname().nodename} since 2" in line
        assert "(a test) (wait until it is done, stop that process, or name another output folder)" in line
        with holder(place) as third:
            assert f"is being written by process {child.pid}" in said(third)
        with held(tmp_path / "deep" / "other", "another output"):
            assert hidden_names(tmp_path) == [".other.lock", ".out.lock"]
    child.wait()
    with held(place, "the same"):
        assert json.loads(lock_file(place).read_text())["pid"] == os.getpid()
    assert hidden_names(tmp_path) == []


def test_a_lock_is_gone_with_a_killed_process_and_its_file_with_the_next(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with holder(place) as child:
        assert said(child) == "held"
        child.kill()
        child.wait()
    assert hidden_names(tmp_path) == [".out.lock"]
    with held(place, "the next"):
        assert lock_file(place).exists()
    assert hidden_names(tmp_path) == []


def test_a_clean_end_and_a_failure_leave_no_lock_file(tmp_path: Path) -> None:
    with holder(tmp_path / "out") as child:
        assert said(child) == "held"
        child.communicate("go on\n")
    assert child.returncode == 0
    with pytest.raises(KeyboardInterrupt), held(tmp_path / "out", "interrupted"):
        raise KeyboardInterrupt
    assert hidden_names(tmp_path) == []


def test_contenders_never_hold_a_lock_together_though_its_file_comes_and_goes(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0")
    command = [sys.executable, "-c", CONTEND, str(tmp_path / "out"), str(count)]
    children = [subprocess.Popen(command) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert count.read_text() == "180"
    assert hidden_names(tmp_path) == []


def test_a_thread_that_holds_a_lock_may_not_take_it_twice_and_another_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "out"
    refused: list[str] = []

    def other() -> None:
        try:
            with held(place, "another thread"):
                pass
        except OutputError as error:
            refused.append(str(error))

    with held(place, "this thread"):
        assert holds(place)
        with pytest.raises(RuntimeError, match="already locked by this thread"), held(place, "again"):
            pass
        with alone(place, "the same work"):
            assert holds(place)
        assert holds(place)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert not holds(place)
    assert len(refused) == 1
    assert f"is being written by process {os.getpid()}" in refused[0]
    assert hidden_names(tmp_path) == []


def test_a_folder_reached_through_a_link_is_the_same_output(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with holder(tmp_path / "real" / "out") as child:
        assert said(child) == "held"
        with pytest.raises(OutputError, match="is being written"), held(tmp_path / "link" / "out", "x"):
            pass


def test_the_lock_of_a_folder_that_fills_up_lies_in_it(tmp_path: Path) -> None:
    with held(tmp_path / "run", "a run", inside=True):
        assert hidden_names(tmp_path) == [".run.lock"]
        assert (tmp_path / "run" / ".run.lock").exists()
    assert hidden_names(tmp_path) == []


def test_no_place_for_a_lock_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a part of the path is a file"), held(tmp_path / "file" / "out", "x"):
        pass

    def unknown(_fd: int, _operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", unknown)
    with pytest.raises(OutputError, match="knows no locks"), held(tmp_path / "out", "x"):
        pass


def test_a_new_folder_is_locked_while_it_is_made_and_clears_up_after_a_killed_process(tmp_path: Path) -> None:
    place = tmp_path / "out"
    (tmp_path / ".out.partial-dead").mkdir()
    (tmp_path / ".out2.partial-another").mkdir()
    aside = tmp_path / ".out.old-dead" / "folder"
    aside.mkdir(parents=True)
    write_stage(aside, "demo", {})
    with pytest.raises(ValueError, match="stopped"), new_folder(place):  # noqa: PT012 - the block is what is stopped
        assert holds(place)
        assert (place / "stage.json").exists()  # what was put aside when the process was killed
        raise ValueError("stopped")
    assert (place / "stage.json").exists()
    assert hidden_names(tmp_path) == [".out2.partial-another"]
    with holder(place) as child:
        assert said(child) == "held"
        (tmp_path / ".out.partial-alive").mkdir()
        with pytest.raises(OutputError, match="is being written by process"), new_folder(place):
            pass
        assert (tmp_path / ".out.partial-alive").exists()
