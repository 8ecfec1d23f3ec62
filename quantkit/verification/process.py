"""Run a verification job in a fresh process."""

from __future__ import annotations

import os
from typing import Any

from quantkit.errors import EvaluationError
from quantkit.system.child import Limits, run_child
from quantkit.system.ending import Kind
from quantkit.verification.job import VerificationJob


def carry_out(command: list[str], job: VerificationJob) -> dict[str, Any]:
    """Run a job by a runtime's command.

    Args:
        command: what the job's file is appended to.
        job: what to do.

    Returns:
        The answer, see :mod:`quantkit.verification.job`.

    Raises:
        EvaluationError: the process died, or the checkpoint cannot be loaded.
        QuantkitError: any other mistake of the user, as the process found it.
    """
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    if not job.trust_remote_code:
        environment["HF_HUB_OFFLINE"] = "1"
    limits = Limits(seconds=job.seconds)
    ending = run_child(command, job.to_json(), job.folder, environment=environment, log=job.log, limits=limits)
    if ending.kind is Kind.TIME_LIMIT:
        raise EvaluationError(
            f"{job.runtime} did not answer from {job.checkpoint} within {job.seconds:.0f} s; last line of its log:"
            f" {ending.last_line()}",
            "give it longer with --time-limit, if it is slow and does not hang",
        )
    answer = ending.answer()
    if ending.status or not answer:
        raise EvaluationError(
            f"{job.runtime} did not answer from {job.checkpoint} ({ending.how}): {ending.last_error()}"
        )
    return answer
