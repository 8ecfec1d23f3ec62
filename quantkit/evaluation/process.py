"""Run a job in a fresh process, and say precisely how it ended if it did not end well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from quantkit.errors import EvaluationError
from quantkit.evaluation.job import EvaluationJob, Progress
from quantkit.system.artifacts import read_json, translated_os_errors, write_json
from quantkit.system.processes import last_line, restored_error, signal_name

RESULT_FILE = "result.json"


def run_job(job: EvaluationJob, *, log: Path, on_progress: Progress | None = None) -> dict[str, Any]:
    """Score a checkpoint in a process of its own.

    Args:
        job: what to score.
        log: file for everything that the process prints; replaced if it exists.
        on_progress: called in this process with each step's name, what is done and the total.

    Returns:
        ``metrics``, ``texts``, ``size_bytes``, ``memory``, ``speed``, ``seconds`` and ``environment``; see
        :func:`quantkit.evaluation.evaluate.evaluate`.

    Raises:
        EvaluationError: the checkpoint cannot be scored; the process died, and how; the log is named.
        QuantkitError: any other mistake of the user, as the process found it.
    """
    with tempfile.TemporaryDirectory(prefix="quantkit-evaluation-") as scratch:
        job_file = Path(scratch) / "job.json"
        write_json(job_file, job.to_json())
        with translated_os_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            file = log.open("wb")
        with file:
            status = _run(worker_command(job_file), _environment(job), file, on_progress)
        return _outcome(status, job_file.with_name(RESULT_FILE), job, log)


def worker_command(job_file: Path) -> list[str]:
    """The command line of the process."""
    return [sys.executable, "-m", "quantkit.evaluation.worker", str(job_file)]


def _environment(job: EvaluationJob) -> dict[str, str]:
    environment = {**os.environ, "TQDM_DISABLE": "1", "DISABLE_MULTIPROC": "1"}  # the last is lm-evaluation-harness's
    if job.is_local:
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def _run(command: list[str], environment: dict[str, str], log: IO[bytes], on_progress: Progress | None) -> int:
    """Run ``command`` to its end: progress lines go to ``on_progress``, all else to the log."""
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
    ) as child:  # its standard input is its lifeline
        try:
            for line in child.stdout or ():
                progress = _parsed_progress(line)
                if progress is None:
                    log.write(line)
                    log.flush()
                elif on_progress is not None:
                    on_progress(*progress)
            child.wait()  # with its lifeline: leaving this block would cut it
        except BaseException:
            child.kill()
            raise
    return child.returncode


def _parsed_progress(line: bytes) -> tuple[str, int, int] | None:
    try:
        data = json.loads(line)
    except ValueError:
        return None
    if not isinstance(data, dict) or set(data) != {"step", "done", "total"}:
        return None
    return str(data["step"]), int(data["done"]), int(data["total"])


def _outcome(status: int, result_file: Path, job: EvaluationJob, log: Path) -> dict[str, Any]:
    """The result that the process left, or the error that says why there is none."""
    result: dict[str, Any] | None = read_json(result_file) if result_file.exists() else None
    if result is not None and "error" in result:
        raise restored_error(**result["error"])
    last = last_line(log)
    if status < 0:
        raise EvaluationError(
            f"scoring {job.checkpoint} was killed by {signal_name(-status)}; last line of its log: {last}",
            _remedy_for_signal(-status, log),
        )
    if status != 0:
        raise EvaluationError(
            f"scoring {job.checkpoint} failed with exit code {status}: {last}", f"the whole message is in {log}"
        )
    if result is None:
        raise EvaluationError(
            f"scoring {job.checkpoint} ended without a result; last line of its log: {last}",
            f"what it printed is in {log}",
        )
    return result


def _remedy_for_signal(number: int, log: Path) -> str:
    if signal_name(number) != "SIGKILL":
        return f"the whole log is {log}"
    return (
        "the system most likely ran out of memory: free some, lower evaluation.context_length, or choose an"
        f" evaluation.dtype of 16 bits; the whole log is {log}"
    )
