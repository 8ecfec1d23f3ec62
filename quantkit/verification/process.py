"""Run a verification job in a fresh process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from quantkit.artifacts import read_json, write_json
from quantkit.errors import EvaluationError
from quantkit.processes import last_error, restored_error, signal_name
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
        done = subprocess.run(
            [*command, str(job_file)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            check=False,
        )
    answer: dict[str, Any] = read_json(job.result) if job.result.exists() else {}
    if "error" in answer:
        raise restored_error(**answer["error"])
    if done.returncode or not answer:
        how = signal_name(-done.returncode) if done.returncode < 0 else f"exit code {done.returncode}"
        raise EvaluationError(f"{job.runtime} did not answer from {job.checkpoint} ({how}): {last_error(log)}")
    return answer
