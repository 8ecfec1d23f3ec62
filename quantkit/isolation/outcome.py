"""How a worker ended, told apart."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from quantkit.errors import QuantizationError
from quantkit.system.processes import last_error, last_line, signal_name
from quantkit.system.units import in_units


class Kind(StrEnum):
    """The ways in which a worker ends."""

    DONE = "done"
    MEMORY_LIMIT = "memory limit"
    NO_MEMORY = "out of memory"
    TIME_LIMIT = "time limit"
    SIGNAL = "signal"
    ERROR = "error"
    NO_RESULT = "no result"
    BAD_OUTPUT = "bad output"


class WorkerFailedError(QuantizationError):
    """A library left no checkpoint that can be used.

    Args:
        problem: how it ended.
        remedy: what the user can do.
        facts: for the report, see :meth:`Ending.facts`.
    """

    def __init__(self, problem: str, remedy: str = "", *, facts: dict[str, Any]) -> None:
        super().__init__(problem, remedy)
        self.facts = facts


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known of a worker that has ended.

    Attributes:
        kind: how; never :attr:`Kind.BAD_OUTPUT`, which only a look at the output can tell.
        status: exit code, or minus the number of the signal.
        seconds: from its start.
        peak_bytes: resident at most, all its processes together.
        limit: the limit that it ran into, in words.
        result: what it wrote, if anything.
        log: everything that it printed.
    """

    kind: Kind
    status: int
    seconds: float
    peak_bytes: int
    limit: str
    result: dict[str, Any] | None
    log: Path

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {
            "ending": self.kind.value,
            "status": self.status,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "log": str(self.log),
        }

    def error(self, name: str) -> WorkerFailedError:
        """Why there is no checkpoint, in one line with a remedy.

        Args:
            name: of library and method.
        """
        return WorkerFailedError(*_words(self, name), facts=self.facts())


def _words(ending: Ending, name: str) -> tuple[str, str]:
    """Problem and remedy."""
    peak, log = in_units(ending.peak_bytes), f"its log is {ending.log}"
    match ending.kind:
        case Kind.MEMORY_LIMIT:
            return (
                f"{name} was ended: it had {peak} of memory, and its limit is {ending.limit}",
                f"raise limits.memory, or quantize a smaller model; {log}",
            )
        case Kind.NO_MEMORY if ending.result is None:
            return (
                f"{name} was killed by the system, which ran out of memory; at its peak it had {peak}",
                f"free some memory; {log}",
            )
        case Kind.TIME_LIMIT:
            return (
                f"{name} was ended: it was not done after {ending.limit}; last line of its log: "
                f"{last_line(ending.log)}",
                f"raise limits.time if it was still at work; {log}",
            )
        case Kind.SIGNAL:
            return (
                f"{name} was killed by {signal_name(-ending.status)}; last line of its log: {last_line(ending.log)}",
                log,
            )
        case Kind.ERROR | Kind.NO_MEMORY:
            error = (ending.result or {}).get("error")
            told = f"{error['type']}: {error['message']}" if error else last_error(ending.log)
            what = "ran out of memory" if ending.kind is Kind.NO_MEMORY else "failed"
            return f"{name} {what}: {told}", f"the traceback is in its log, {ending.log}"
        case _:
            return (
                f"{name} ended with exit code {ending.status} and without a result; last line of its log: "
                f"{last_line(ending.log)}",
                log,
            )
