"""Real processes of the command line, which stop where a test wants them to."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

MAIN = [sys.executable, "-c", "from quantkit.cli import main; main()"]
STEPPING = """
import sys
from quantkit.engine.calibrating import Calibration
own = Calibration.{method}
calls = []
def stepping(self, *given, **keys):
    calls.append(given)
    print(len(calls), flush=True)
    if sys.stdin.readline() == "all\\n":
        Calibration.{method} = own
    return own(self, *given, **keys)
Calibration.{method} = stepping
from quantkit.cli import main
main()
"""
"""A command that says before each call of a method of its walk how many there were, and waits for a line."""


def command(*arguments: object) -> list[str]:
    """A command line."""
    return [*MAIN, *map(str, arguments)]


def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command, to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


@contextmanager
def stepping(method: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command that waits before each call of a method of its walk; killed when the block ends."""
    pipe = subprocess.PIPE
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    line = [sys.executable, "-c", STEPPING.replace("{method}", method), *map(str, arguments)]
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True, preexec_fn=heard) as child:
        try:
            yield child
        finally:
            child.kill()


def go_to(child: subprocess.Popen[str], call: int) -> None:
    """Let a stepping command go on until it stands before a call."""
    assert child.stdin
    assert child.stdout
    for number in range(1, call + 1):
        if number > 1:
            child.stdin.write("next\n")
            child.stdin.flush()
        assert child.stdout.readline() == f"{number}\n", child.stderr and child.stderr.read()


def read_line(child: subprocess.Popen[str]) -> str:
    """A line that it prints on standard error."""
    assert child.stderr
    return child.stderr.readline().rstrip("\n")


def quantize_arguments(model: Path, records: Path, out: Path, *further: object) -> Sequence[object]:
    """``quantkit quantize`` of a tiny model with a few calibration rows."""
    calibration = ("--calibration", records, "--samples", 8, "--max-length", 48)
    return ("quantize", model, "-o", out, "--group-size", 32, *calibration, *further)
