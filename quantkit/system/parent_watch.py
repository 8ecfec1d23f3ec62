"""The lifeline of a child process: its standard input, which ends when whoever started it does.

A process that is killed cannot end its children. So each child watches for the end of its standard input, of which its
parent holds the other end and writes nothing: it comes however the parent ends, and on every system. This file imports
nothing of quantkit, so that processes in other interpreters can load it by its path.
"""

from __future__ import annotations

import os
import signal
import threading

EXIT_ORPHANED = 143
"""As of a process that SIGTERM ended."""


def live_no_longer_than_the_parent(*, group: bool = False) -> None:
    """Watch the lifeline in a thread, out of sight of all that runs here and of the processes that it starts.

    Standard input is empty from then on.

    Args:
        group: end the whole process group, which this process leads, and not this process alone.
    """
    lifeline = os.dup(0)
    os.set_inheritable(lifeline, False)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        while os.read(lifeline, 1):
            pass
        if group:
            os.killpg(os.getpgid(0), signal.SIGKILL)
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, daemon=True).start()
