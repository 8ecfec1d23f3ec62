"""The process that scores one checkpoint: ``python -m quantkit.evaluation.worker JOB.json``.

It writes ``result.json`` beside the job's file. Its standard output carries one JSON line for each step of
progress and nothing else; whatever a library prints goes to standard error, which is the log. When its standard input
ends, so does the process, see :mod:`quantkit.system.parent_watch`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

from quantkit.errors import EXIT_USER_ERROR, QuantkitError
from quantkit.evaluation.job import EvaluationJob
from quantkit.evaluation.process import RESULT_FILE
from quantkit.system.artifacts import read_json, write_json
from quantkit.system.parent_watch import live_no_longer_than_the_parent


def main(arguments: list[str]) -> int:
    """Carry out the job in the file ``arguments[0]``; returns the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m quantkit.evaluation.worker JOB.json\n")
        return EXIT_USER_ERROR
    live_no_longer_than_the_parent()
    faulthandler.enable()
    channel = _ProgressChannel()
    job_file = Path(arguments[0])
    result: dict[str, Any]
    try:
        result = _perform(EvaluationJob.from_json(read_json(job_file)), channel)
        code = 0
    except QuantkitError as error:
        result = {"error": {"kind": type(error).__name__, "problem": error.problem, "remedy": error.remedy}}
        code = EXIT_USER_ERROR
    write_json(job_file.with_name(RESULT_FILE), result)
    return code


def _perform(job: EvaluationJob, channel: _ProgressChannel) -> dict[str, Any]:
    from quantkit.evaluation.evaluate import evaluate  # imports torch, whose messages belong in the log

    return evaluate(job, channel.send)


class _ProgressChannel:
    """The process's standard output, kept for progress; file descriptor 1 becomes standard error."""

    def __init__(self) -> None:
        self._stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, step: str, done: int, total: int) -> None:
        self._stream.write(json.dumps({"step": step, "done": done, "total": total}) + "\n")
        self._stream.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
