"""What every worker process does at its start and its end: the other side of :mod:`quantkit.system.child`.

Its standard input is its lifeline. A process that is killed cannot end its children; so each child watches for the end
of its standard input, of which its parent holds the other end: it comes however the parent ends, and on every system. A
child that does one job is given nothing else by it; one that lives on is given requests, a line each. Its standard
output carries its progress or its answers, a line of JSON for each, and nothing else.

This file imports nothing of quantkit at its head, so that processes in other interpreters can load it by its path.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXIT_ORPHANED = 143
"""As of a process that SIGTERM ended."""
JOB_FILE, RESULT_FILE = "job.json", "result.json"
"""In one folder: what is asked of a worker, and what it leaves."""
Report = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and how much there is."""


def serve(arguments: list[str], perform: Callable[[Any, Report], dict[str, Any]]) -> int:
    """Carry out the job in the file ``arguments[0]``; the result, or a mistake of the user, is left beside it.

    Args:
        arguments: of the command line.
        perform: gives the result of a job's content.

    Returns:
        The exit code.
    """
    from quantkit.errors import EXIT_USER_ERROR, QuantkitError
    from quantkit.system.artifacts import read_json, write_json

    if len(arguments) != 1:
        sys.stderr.write(f"usage: {Path(sys.argv[0]).stem} JOB.json\n")
        return EXIT_USER_ERROR
    live_no_longer_than_the_parent()
    report = progress_channel()
    faulthandler.enable()
    job_file = Path(arguments[0])
    try:
        result, code = perform(read_json(job_file), report), 0
    except QuantkitError as error:
        result = {"error": {"kind": type(error).__name__, "problem": error.problem, "remedy": error.remedy}}
        code = EXIT_USER_ERROR
    write_json(job_file.with_name(RESULT_FILE), result)
    gc.freeze()  # the interpreter looks for garbage at its end, among all that libraries made: a second for nothing
    return code


def live_no_longer_than_the_parent(
    hear: Callable[[bytes], None] | None = None, leave: Callable[[], None] | None = None
) -> None:
    """Watch the lifeline in a thread, out of sight of all that runs here and of the processes that it starts.

    Standard input is empty from then on. Where it ends, so does this process, with its group if it leads one.

    Args:
        hear: called in that thread with each line that comes.
        leave: called there before the process ends, for what the parent would have done.
    """
    lifeline = os.dup(0)
    os.set_inheritable(lifeline, False)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        with os.fdopen(lifeline, "rb") as stream:
            for line in stream:
                if hear is not None:
                    hear(line)
        if leave is not None:
            leave()
        if os.name == "posix" and os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, daemon=True).start()


def progress_channel() -> Report:
    """Keep standard output for progress: whatever else is printed goes to standard error from here on."""
    tell = _channel()
    return lambda step, done, total: tell({"step": str(step), "done": int(done), "total": int(total)})


def requests_and_answers(leave: Callable[[], None]) -> tuple[queue.SimpleQueue[bytes], Callable[[Any], None]]:
    """Live no longer than the parent, and serve it: the lines that it writes, and what answers with JSON data.

    Whatever else is printed goes to standard error from here on.

    Args:
        leave: see :func:`live_no_longer_than_the_parent`.
    """
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    live_no_longer_than_the_parent(heard.put, leave)
    return heard, _channel()


def _channel() -> Callable[[Any], None]:
    """Standard output for lines of JSON alone: whatever else is printed goes to standard error from here on."""
    channel = os.dup(1)
    os.set_inheritable(channel, False)
    stream = os.fdopen(channel, "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)

    def tell(data: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody need listen
            stream.write(json.dumps(data) + "\n")
            stream.flush()

    return tell
