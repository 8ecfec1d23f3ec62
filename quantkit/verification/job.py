"""What a process is asked to do with a checkpoint, what it answers, and how it is run.

A process is started with the path of a job. It loads the checkpoint, writes the logits after
every token of every prompt as float32 ``[tokens, vocabulary]`` (``.npy``, prompts one after another) to ``logits``,
then its answer to ``result``, which lies beside the job:

``generated``
    token ids of a greedy continuation.
``load_seconds``, ``peak_bytes``, ``dtype``, ``device``, ``vocabulary``, ``versions``
    facts.
``settings``
    switches of the runtime that bear on its numbers.
``dropped``
    names of tensors that the loader was given and did not use.
``error``
    alone: ``kind``, ``problem`` and ``remedy`` of what went wrong.

What it prints is its log. Its standard input ends when whoever asked has ended, see :mod:`quantkit.system.worker`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import EvaluationError
from quantkit.system.child import Limits, run_child
from quantkit.system.ending import Kind
from quantkit.system.worker import RESULT_FILE

SECONDS = 3600.0
"""A runtime that has not answered by then hangs."""
WORKER = (sys.executable, "-m", "quantkit.verification.worker")


@dataclass(frozen=True, slots=True)
class VerificationJob:
    """One checkpoint for one runtime.

    Attributes:
        checkpoint: a folder, or a GGUF file.
        runtime: its name.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: compute dtype.
        context_length: tokens that a prompt and its continuation have at most.
        prompts: token ids.
        generate: which prompt is continued.
        new_tokens: by how many tokens; 0 is not at all.
        folder: for what is asked, the logits, the answer and the log of this job alone; it is there.
        trust_remote_code: run Python code that comes with the checkpoint.
        python: the interpreter of a runtime that has its own.
        seconds: after which whoever started the process ends it; no part of the JSON.
    """

    checkpoint: Path
    runtime: str
    device: str
    dtype: str
    context_length: int
    prompts: tuple[tuple[int, ...], ...]
    generate: int
    new_tokens: int
    folder: Path
    trust_remote_code: bool = False
    python: str | None = None
    seconds: float = SECONDS

    @property
    def logits(self) -> Path:
        """The file of the logits."""
        return self.folder / "logits.npy"

    @property
    def log(self) -> Path:
        """All that the process prints."""
        return self.folder / "log"

    def to_json(self) -> dict[str, Any]:
        """The job as JSON data."""
        return {
            "checkpoint": str(self.checkpoint),
            "runtime": self.runtime,
            "device": self.device,
            "dtype": self.dtype,
            "context_length": self.context_length,
            "prompts": [list(ids) for ids in self.prompts],
            "generate": self.generate,
            "new_tokens": self.new_tokens,
            "logits": str(self.logits),
            "result": str(self.folder / RESULT_FILE),
            "trust_remote_code": self.trust_remote_code,
            "python": self.python,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> VerificationJob:
        """The inverse of :meth:`to_json`."""
        given = {key: value for key, value in data.items() if key not in ("logits", "result")}
        places = {"checkpoint": Path(data["checkpoint"]), "folder": Path(data["result"]).parent}
        return cls(**{**given, **places, "prompts": tuple(map(tuple, data["prompts"]))})


def carry_out(job: VerificationJob, command: tuple[str, ...] = WORKER) -> dict[str, Any]:
    """Run a job in a process of its own.

    Args:
        job: what to do.
        command: what the job's file is appended to.

    Returns:
        The answer.

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
