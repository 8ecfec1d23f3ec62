"""A process that runs commands one after the other, each as a user would, within limits of memory and time.

It reads one JSON list of a folder and the arguments of ``quantkit`` a line and answers each with one line of JSON:
``code``, ``output``, ``errors`` and ``seconds`` of the processor, with those of the processes that it started. The
limits hold for these too.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

MEMORY = 3 << 30
"""Bytes beyond what the libraries take at their start."""
TEMPLATE_SECONDS = 3.0
"""That a chat template may take here."""
SECONDS = 300
"""Of the wall clock, before a command that waits for ever is ended from inside with a traceback. It is no measure of a
command, which seconds of the processor are: the machine may do other things meanwhile."""


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch
    import transformers
    import typer.testing

    from quantkit.cli import app
    from quantkit.records import sandbox

    sandbox.SECONDS = TEMPLATE_SECONDS
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    _limit_memory()
    signal.signal(signal.SIGALRM, _too_late)
    for line in sys.stdin:
        folder, arguments = json.loads(line)
        os.chdir(folder)
        answers.write(json.dumps(_run(typer.testing.CliRunner(), app, arguments)) + "\n")
        answers.flush()


class TooLateError(BaseException):
    """The command took too long; no handler of the product catches it."""


def _too_late(_number: int, _frame: object) -> None:
    raise TooLateError


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _run(runner: Any, app: Any, arguments: list[str]) -> dict[str, Any]:
    begin = _processor_seconds()
    signal.alarm(SECONDS)
    try:
        done = runner.invoke(app, arguments)
    except TooLateError as error:
        where = "".join(traceback.format_exception(error)[-6:])
        return {"code": -1, "output": "", "errors": f"after {SECONDS} s:\n{where}", "seconds": float(SECONDS)}
    finally:
        signal.alarm(0)
    crash = done.exception
    told = "" if crash is None or isinstance(crash, SystemExit) else "".join(traceback.format_exception(crash))
    return {
        "code": done.exit_code,
        "output": done.stdout,
        "errors": done.stderr + told,
        "seconds": _processor_seconds() - begin,
    }


def _processor_seconds() -> float:
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
