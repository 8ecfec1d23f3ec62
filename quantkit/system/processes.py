"""How a child process ended, in words, and the error that it raised."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from quantkit.errors import QuantkitError

LONGEST_LOG_LINE = 300
EMPTY = "(the log is empty)"
ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b")


def restored_error(kind: str, problem: str, remedy: str) -> QuantkitError:
    """The error that a process raised, with its class and text."""
    classes = {cls.__name__: cls for cls in QuantkitError.__subclasses__()}
    cls = classes.get(kind, QuantkitError)
    error = cls.__new__(cls)  # a subclass may take other arguments than problem and remedy
    QuantkitError.__init__(error, problem, remedy)
    return error


def signal_name(number: int) -> str:
    """Such as ``SIGKILL``."""
    return {member.value: member.name for member in signal.Signals}.get(number, f"number {number}")


def last_line(log: Path) -> str:
    """The last line of a log that holds something; progress bars and colours are taken out."""
    lines = _lines(log)
    return lines[-1][:LONGEST_LOG_LINE] if lines else EMPTY


def last_error(log: Path) -> str:
    """The last exception that a log shows, with what follows it; the last line where it shows none."""
    lines = _lines(log)
    errors = [place for place, line in enumerate(lines) if ERROR.match(line)]
    return " ".join(lines[errors[-1] :])[:LONGEST_LOG_LINE] if errors else last_line(log)


def _lines(log: Path) -> list[str]:
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", log.read_text(encoding="utf-8", errors="replace"))
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
