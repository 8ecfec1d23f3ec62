"""The command line: one thin command per public function."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module

from quantkit.cli.base import app, warn
from quantkit.system import threads
from quantkit.system.distribution import warnings
from quantkit.system.shutdown import Terminated, request

__all__ = ["app", "main"]

COMPLETION = "_QUANTKIT_COMPLETE"
"""Set where a shell asks what may follow; see click's shell completion."""
WILL_STOP = b"asked to stop: the block under way is finished and saved first; ask again to stop at once\n"

# each adds its commands, in the order of the help
for _module in ("fitting", "running", "making", "history", "checkpoints", "choices"):
    import_module(f"quantkit.cli.{_module}")


def main() -> None:
    """The entry point; SIGTERM ends the work after the block at hand, so that nothing done is lost."""
    os.environ.update(threads.variables(os.environ))  # before torch is loaded
    signal.signal(signal.SIGTERM, _terminate)
    if COMPLETION not in os.environ:
        warn(warnings())
    app()


def _terminate(_number: int, _frame: object) -> None:
    """Finish the block and save it; where nothing is under way that can, or asked for the second time, stop at once."""
    if not request():
        raise Terminated
    os.write(sys.stderr.fileno(), WILL_STOP)  # not print, which may be in the middle of a line of its own
