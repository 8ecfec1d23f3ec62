"""The one runner of child processes: progress, limits, logs, endings, and nothing left behind."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from quantkit.errors import EvaluationError, OutputError
from quantkit.system import threads
from quantkit.system.child import Limits, run_child
from quantkit.system.child_log import BoundedLog, last_error, last_line
from quantkit.system.ending import Ending, Kind
from quantkit.system.shutdown import Terminated, patient, request

SERVE = "import sys\nfrom quantkit.system.worker import serve\n"


def run(folder: Path, code: str, job: Any = None, **options: Any) -> Ending:
    """Run a script whose argument is the file of a job."""
    place = folder / "place"
    place.mkdir(exist_ok=True)
    given = {"environment": dict(os.environ), "log": folder / "log", **options}
    return run_child([sys.executable, "-c", code], job, place, **given)


def test_a_job_goes_in_progress_is_told_and_a_result_comes_out(tmp_path: Path) -> None:
    code = (
        f"{SERVE}def perform(job, report):\n"
        "    for done in range(job['count']):\n"
        "        report('step', done + 1, job['count'])\n"
        "    print('{\"step\": 1}')\n"
        "    return {'twice': job['count'] * 2}\n"
        "sys.exit(serve(sys.argv[1:], perform))"
    )
    steps: list[tuple[str, int, int]] = []
    ending = run(tmp_path, code, {"count": 300}, on_progress=lambda *step: steps.append(step))
    assert (ending.kind, ending.answer()) == (Kind.DONE, {"twice": 600})
    assert steps == [("step", done, 300) for done in range(1, 301)]
    assert (tmp_path / "log").read_text() == '{"step": 1}\n'


def test_a_mistake_comes_back_with_its_class_and_remedy(tmp_path: Path) -> None:
    code = (
        f"{SERVE}from quantkit.errors import EvaluationError\n"
        "def perform(job, report):\n    raise EvaluationError('no such thing', 'look again')\n"
        "sys.exit(serve(sys.argv[1:], perform))"
    )
    ending = run(tmp_path, code)
    assert (ending.kind, ending.how) == (Kind.ERROR, "exit code 2")
    with pytest.raises(EvaluationError) as caught:
        ending.answer()
    assert (caught.value.problem, caught.value.remedy) == ("no such thing", "look again")


@pytest.mark.parametrize(
    ("code", "kind", "how", "words"),
    [
        ("raise KeyError('x')", Kind.ERROR, "exit code 1", "KeyError: 'x'"),
        ("import os; os.kill(os.getpid(), 9)", Kind.SIGNAL, "SIGKILL", "(the log is empty)"),
        ("print('50%\\rbye')", Kind.NO_RESULT, "exit code 0", "bye"),
        ("import sys; sys.exit(7)", Kind.NO_RESULT, "exit code 7", "(the log is empty)"),
        ("print('[' * 200_000)", Kind.NO_RESULT, "exit code 0", "[" * 300),
    ],
)
def test_endings_are_told_apart(tmp_path: Path, code: str, kind: Kind, how: str, words: str) -> None:
    ending = run(tmp_path, code)
    if how == "SIGKILL" and ending.kind is Kind.NO_MEMORY:
        pytest.skip("the kernel has killed another process for want of memory meanwhile")
    assert (ending.kind, ending.how, ending.last_error()) == (kind, how, words)


def test_an_end_by_the_kernel_for_want_of_memory_is_told_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = iter((3, 4))
    monkeypatch.setattr("quantkit.system.processes.killed_for_memory", lambda: next(counted))
    ending = run(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert (ending.kind, ending.how) == (Kind.NO_MEMORY, "SIGKILL, as the system ran out of memory")


def test_what_hangs_ends_at_its_time_and_may_say_good_bye(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "def leave(number, frame):\n"
        "    time.sleep(0.3)\n    print('good bye', file=sys.stderr, flush=True)\n    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "time.sleep(600)"
    )
    ending = run(tmp_path, code, limits=Limits(seconds=3))
    assert (ending.kind, ending.limit) == (Kind.TIME_LIMIT, "3 s")
    assert ending.last_line() == "good bye"


def test_a_child_that_starts_others_and_is_over_its_memory_leaves_none(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, subprocess, sys, time\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; held = bytearray(300 << 20); time.sleep(600)'],"
        " start_new_session=True)\n"
        "pathlib.Path(sys.argv[1]).with_name('pid').write_text(str(other.pid))\n"
        "time.sleep(600)"
    )
    ending = run(tmp_path, code, limits=Limits(memory_bytes=200 << 20))
    assert (ending.kind, ending.limit) == (Kind.MEMORY_LIMIT, "200.00 MiB")
    assert ending.peak_bytes > 200 << 20
    other = int((tmp_path / "place" / "pid").read_text())
    assert not psutil.pid_exists(other) or psutil.Process(other).status() == psutil.STATUS_ZOMBIE


def test_a_request_to_stop_ends_a_child_that_is_waited_for(tmp_path: Path) -> None:
    code = 'print(\'{"step": "x", "done": 0, "total": 1}\', flush=True)\nimport time; time.sleep(600)'
    started, before = time.monotonic(), psutil.Process().children()
    with pytest.raises(Terminated), patient():
        run(tmp_path, code, on_progress=lambda *step: threading.Thread(target=request).start())
    assert time.monotonic() - started < 60
    assert psutil.Process().children() == before


def test_a_child_keeps_to_the_threads_of_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import json, os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1]).with_name('result.json').write_text(json.dumps(dict(os.environ)))"
    )
    for name in threads.WAITING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "quota_of", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("A_SECRET", "x")
    told = run(tmp_path, code, environment={"PATH": os.environ["PATH"]}).answer()
    assert (told["OMP_NUM_THREADS"], told["OMP_WAIT_POLICY"]) == ("3", "PASSIVE")
    assert "A_SECRET" not in told
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    told = run(tmp_path, code, environment={}).answer()
    assert told["GOMP_SPINCOUNT"] == "7"
    assert "OMP_NUM_THREADS" not in told
    assert "OMP_WAIT_POLICY" not in told


def test_a_log_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", head=1000, tail=500)
    for number in range(100_000):
        log.write(b"%06d\n" % number)
    log.close()
    text = (tmp_path / "log").read_text()
    assert text.startswith("000000\n000001\n")
    assert text.endswith("099998\n099999\n")
    assert "bytes are left out here" in text
    assert len(text) < 2_000


def test_a_child_that_prints_without_end_fills_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.system.child.BoundedLog", lambda file: BoundedLog(file, head=1 << 16, tail=1 << 12))
    run(tmp_path, "import sys\nfor _ in range(200):\n    sys.stderr.write('x' * 99_999 + '\\n')\nprint('done')")
    assert (tmp_path / "log").stat().st_size < 1 << 20


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="a part of the path is a file"):
        run(tmp_path, "pass", log=tmp_path / "taken" / "log")


def test_last_words_leave_out_progress_bars_and_colours(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("\x1b[31mValueError: first\x1b[0m\nmore of it\n 10%|x\r 99%|x\n")
    assert last_line(log) == "99%|x"
    assert last_error(log) == "ValueError: first more of it 10%|x 99%|x"


def test_the_file_of_a_job_is_what_was_asked(tmp_path: Path) -> None:
    code = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[1].replace('job.json', 'result.json'))"
    asked = {"text": "größe", "numbers": [1, 2.5, None]}
    assert run(tmp_path, code, asked).answer() == json.loads(json.dumps(asked))
