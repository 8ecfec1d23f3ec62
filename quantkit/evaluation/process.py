"""Run a job in a fresh process, and say precisely how it ended if it did not end well."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantkit.errors import EvaluationError
from quantkit.evaluation.job import EvaluationJob, Progress
from quantkit.system.child import run_child
from quantkit.system.ending import Ending, Kind


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
        ending = run_child(
            worker_command(),
            job.to_json(),
            Path(scratch),
            environment=_environment(job),
            log=log,
            on_progress=on_progress,
        )
    return _outcome(ending, job)


def worker_command() -> list[str]:
    """The command line of the process, to which the path of the job's file is appended."""
    return [sys.executable, "-m", "quantkit.evaluation.worker"]


def _environment(job: EvaluationJob) -> dict[str, str]:
    environment = {**os.environ, "TQDM_DISABLE": "1", "DISABLE_MULTIPROC": "1"}  # the last is lm-evaluation-harness's
    if job.is_local:
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def _outcome(ending: Ending, job: EvaluationJob) -> dict[str, Any]:
    """The result that the process left, or the error that says why there is none."""
    result = ending.answer()
    if ending.status < 0:
        raise EvaluationError(
            f"scoring {job.checkpoint} was killed by {ending.how}; last line of its log: {ending.last_line()}",
            _remedy_for_signal(ending),
        )
    if ending.status != 0:
        raise EvaluationError(
            f"scoring {job.checkpoint} failed with {ending.how}: {ending.last_line()}",
            f"the whole message is in {ending.log}",
        )
    if not result:
        raise EvaluationError(
            f"scoring {job.checkpoint} ended without a result; last line of its log: {ending.last_line()}",
            f"what it printed is in {ending.log}",
        )
    return result


def _remedy_for_signal(ending: Ending) -> str:
    if not ending.how.startswith("SIGKILL"):
        return f"the whole log is {ending.log}"
    guess = "" if ending.kind is Kind.NO_MEMORY else "the system most likely ran out of memory: "
    remedy = "free some memory, lower evaluation.context_length, or choose an evaluation.dtype of 16 bits"
    return f"{guess}{remedy}; the whole log is {ending.log}"
