"""Run a verification job in a fresh process."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from quantkit.errors import EvaluationError
from quantkit.system.artifacts import read_json, write_json
from quantkit.system.processes import last_error, last_line, restored_error, signal_name
from quantkit.verification.job import VerificationJob


def carry_out(command: list[str], job: VerificationJob, log: Path) -> dict[str, Any]:
    """Run a job by a runtime's command.

    Args:
        command: what the job's file is appended to.
        job: what to do.
        log: file for everything that the process prints.

    Returns:
        The answer, see :mod:`quantkit.verification.job`.

    Raises:
        EvaluationError: the process died, or the checkpoint cannot be loaded.
        QuantkitError: any other mistake of the user, as the process found it.
    """
    job_file = log.with_suffix(".json")
    write_json(job_file, job.to_json())
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    if not job.trust_remote_code:
        environment["HF_HUB_OFFLINE"] = "1"
    with log.open("wb") as file:
        status = _run([*command, str(job_file)], environment, file, job.seconds)
    if status is None:
        raise EvaluationError(
            f"{job.runtime} did not answer from {job.checkpoint} within {job.seconds:.0f} s; last line of its log:"
            f" {last_line(log)}",
            "give it longer with --time-limit, if it is slow and does not hang",
        )
    answer: dict[str, Any] = read_json(job.result) if job.result.exists() else {}
    if "error" in answer:
        raise restored_error(**answer["error"])
    if status or not answer:
        how = signal_name(-status) if status < 0 else f"exit code {status}"
        raise EvaluationError(f"{job.runtime} did not answer from {job.checkpoint} ({how}): {last_error(log)}")
    return answer


def _run(command: list[str], environment: dict[str, str], log: IO[bytes], seconds: float) -> int | None:
    """Run a process and all that it starts to their end; None if they had to be ended at the time limit."""
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
    ) as child:  # its standard input is its lifeline
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
