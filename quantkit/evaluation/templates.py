"""Templates and patterns of tasks in place of lm-evaluation-harness's own, which run in this process without a limit.

Each text is made, and each answer searched, by the process of :mod:`quantkit.records.sandbox`, which is ended where a
template or a pattern does not end.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from quantkit.errors import EvaluationError
from quantkit.records.sandbox import TemplateFailure, find_all, render_task, substitute

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Template:
    """A template as the package asks for one.

    Attributes:
        source: of Jinja.
    """

    source: str

    def render(self, /, **document: Any) -> str:
        """The text of a document.

        Raises:
            jinja2.TemplateError: the template is broken, does what it may not, or does not end.
        """
        import jinja2

        try:
            return render_task(self.source, document)
        except TemplateFailure as error:
            raise jinja2.TemplateError(str(error)) from error


class Templates:
    """What stands in for ``lm_eval.utils.env``."""

    def from_string(self, source: str) -> Template:
        """A template; it is first read when it is rendered."""
        return Template(source)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled pattern as the package uses one.

    Attributes:
        pattern: its source.
        flags: of :mod:`re`.
    """

    pattern: str
    flags: int

    def findall(self, string: str) -> list[Any]:
        """All matches.

        Raises:
            EvaluationError: it does not end.
        """
        return _judged(self.pattern, lambda: find_all(self.pattern, string, self.flags))


class Patterns:
    """What stands in for :mod:`re` where the package matches patterns of a task with what the model said."""

    escape = staticmethod(re.escape)

    def compile(self, pattern: str, flags: int = 0) -> Pattern:
        """A pattern.

        Raises:
            re.error: it is none.
        """
        re.compile(pattern, flags)
        return Pattern(pattern, int(flags))

    def findall(self, pattern: str, string: str, flags: int = 0) -> list[Any]:
        """All matches.

        Raises:
            EvaluationError: it does not end.
        """
        return Pattern(pattern, int(flags)).findall(string)

    def sub(self, pattern: str, repl: str, string: str, flags: int = 0) -> str:
        """The text with each match replaced.

        Raises:
            EvaluationError: it does not end.
        """
        return _judged(pattern, lambda: substitute(pattern, repl, string, int(flags)))


def _judged(pattern: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except TemplateFailure as error:
        raise EvaluationError(f"the pattern '{pattern[:80]}' of a task fails: {error}", "mend the task") from error
