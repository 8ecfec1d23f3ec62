"""How a child process ended, told apart, and the error that it raised."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.system.child_log import last_error, last_line
from quantkit.system.processes import signal_name


class Kind(StrEnum):
    """The ways in which a child ends."""

    DONE = "done"
    MEMORY_LIMIT = "memory limit"
    NO_MEMORY = "out of memory"
    TIME_LIMIT = "time limit"
    SIGNAL = "signal"
    ERROR = "error"
    NO_RESULT = "no result"


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known of a child that has ended.

    Attributes:
        kind: how.
        status: exit code, or minus the number of the signal.
        seconds: from its start.
        peak_bytes: resident at most, all its processes together; 0 where its memory was not watched.
        limit: the limit that it ran into, in words.
        result: what it left, if anything; alone with ``error``, its ``kind`` and ``problem`` where it failed.
        log: everything that it printed.
    """

    kind: Kind
    status: int
    seconds: float
    peak_bytes: int
    limit: str
    result: dict[str, Any] | None
    log: Path

    @property
    def how(self) -> str:
        """Such as ``SIGKILL`` or ``exit code 1``; of one that the kernel ended for want of memory it says so."""
        if self.status >= 0:
            return f"exit code {self.status}"
        why = ", as the system ran out of memory" if self.kind is Kind.NO_MEMORY else ""
        return f"{signal_name(-self.status)}{why}"

    def answer(self) -> dict[str, Any]:
        """What it left, empty if nothing.

        Raises:
            QuantkitError: that which it left in place of an answer, with its class.
        """
        found = self.result or {}
        if "error" in found:
            raise restored_error(**found["error"])
        return found

    def last_line(self) -> str:
        """The last that it printed."""
        return last_line(self.log)

    def last_error(self) -> str:
        """The last exception that it printed, or the last that it printed at all."""
        return last_error(self.log)


def restored_error(kind: str, problem: str, remedy: str = "") -> QuantkitError:
    """The error that a process raised, with its class and text."""
    classes = {cls.__name__: cls for cls in QuantkitError.__subclasses__()}
    cls = classes.get(kind, QuantkitError)
    error = cls.__new__(cls)  # a subclass may take other arguments than problem and remedy
    QuantkitError.__init__(error, problem, remedy)
    return error
