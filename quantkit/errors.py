"""Everything quantkit raises on purpose.

    QuantkitError
    ├── RecipeError             the recipe asks for something that cannot be
    ├── SourceError             a model reference cannot be resolved or read
    ├── CheckpointError         a checkpoint's files are broken or not what they claim
    ├── CalibrationError        the calibration or evaluation records cannot be used
    ├── SchemeError             a method or a format cannot do this scheme
    ├── QuantizationError       the numbers went wrong while solving a layer
    ├── EvaluationError         the exported file could not be scored
    ├── OutputError             a result cannot be written
    └── MissingDependencyError  an optional package is not installed

Each is a mistake that the user can mend: it carries one line that says what is wrong and, where there
is one, a remedy. The command line prints that line and exits with code 2; a traceback means a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Self

from quantkit.system.redaction import redacted

EXIT_USER_ERROR = 2


class QuantkitError(Exception):
    """Base of all errors that quantkit raises on purpose.

    Args:
        problem: what is wrong, on one line, naming the file, tensor or key.
        remedy: what the user can do about it, on one line; may be empty.

    Attributes:
        others: further mistakes that were found at the same time.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = redacted(" ".join(problem.split()))
        self.remedy = " ".join(remedy.split())
        self.others: tuple[QuantkitError, ...] = ()
        super().__init__(f"{self.problem} ({self.remedy})" if self.remedy else self.problem)

    @classmethod
    def together(cls, found: Sequence[Self]) -> Self:
        """Several mistakes as one error: the first, with the others beside it and in the notes of a traceback."""
        first, *others = found
        first.others = tuple(others)
        for other in others:
            first.add_note(f"also: {other}")
        return first

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with problem and remedy, whatever the subclass is made of, so that it can come from a process."""
        return _unpickled, (type(self), self.problem, self.remedy), self.__dict__


class RecipeError(QuantkitError):
    """The recipe asks for something that cannot be."""


class SourceError(QuantkitError):
    """A model reference cannot be resolved or read."""


class CheckpointError(QuantkitError):
    """A checkpoint's files are broken, incomplete or not what they claim to be."""


class CalibrationError(QuantkitError):
    """Calibration or evaluation records cannot be read or used."""


class SchemeError(QuantkitError):
    """A method or a format cannot do the scheme that was asked for."""


class QuantizationError(QuantkitError):
    """The numbers went wrong while solving a layer."""


class EvaluationError(QuantkitError):
    """An exported file could not be loaded or scored."""


class OutputError(QuantkitError):
    """A result cannot be written: read-only folder, full disk, foreign files in the way."""


class MissingDependencyError(QuantkitError):
    """An optional package is needed and not installed; the remedy is the exact command."""

    def __init__(self, package: str, purpose: str, install: str | None = None) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed",
            f"pip install {install or package}",
        )


def _unpickled(kind: type[QuantkitError], problem: str, remedy: str) -> QuantkitError:
    error = kind.__new__(kind)
    QuantkitError.__init__(error, problem, remedy)
    return error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the nearest match, whatever its case, then all that is allowed."""
    names = sorted(known)
    by_case = {each.casefold(): each for each in names}
    near = difflib.get_close_matches(name.casefold(), by_case, n=1, cutoff=0.5)
    hint = f"did you mean '{by_case[near[0]]}'? " if near else ""
    return f"{hint}known: {', '.join(names)}"
