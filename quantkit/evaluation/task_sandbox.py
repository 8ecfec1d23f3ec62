"""Stand-ins for what lm-evaluation-harness would run of a task in this process, without a limit.

Each text is made, and each answer searched, by the process of :mod:`quantkit.records.sandbox`, and scripts of the
Hugging Face hub are refused. A limit on the whole process that scores would not do: what a task may take, and not what
a model takes, is to be limited, a task that does not end would end the figures of all others with it, and this process
may write files and has the tokens of its user.

The package is not asked for its leave, so a version of it may run things elsewhere. A task of quantkit's own is scored
before any other, in which every stand-in has to be asked.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from quantkit.errors import EvaluationError
from quantkit.records.sandbox import TemplateFailure, find_all, render_task, substitute

T = TypeVar("T")
PROBE = "quantkit_probe"
"""Name of the task that is scored first, and of the metric that it asks for in vain."""


@contextmanager
def sandboxed() -> Iterator[list[str]]:
    """Inside the block templates, patterns and scripts of tasks are limited; gives the scripts that were asked for.

    Raises:
        EvaluationError: this version of the package goes past a stand-in.
    """
    import evaluate
    from lm_eval import utils
    from lm_eval.api import metrics
    from lm_eval.filters import extraction

    refused: list[str] = []

    def refuse(path: str, *args: Any, **options: Any) -> None:
        refused.append(path)
        raise ValueError(f"{path} is a script of the hub")

    templates, answers, scores = Templates(), Patterns(), Patterns()
    stand_ins = ((utils, "env", templates), (evaluate, "load", refuse), (extraction, "re", answers),
                 (metrics, "re", scores))  # fmt: skip
    with ExitStack() as stack:
        for place, name, stand_in in stand_ins:
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, stand_in)
        _score_probe()
        asked = {
            "templates of tasks": templates.asked,
            "patterns that find answers": answers.asked,
            "patterns that metrics ignore": scores.asked,
            "metrics of the hub": PROBE in refused,
        }
        for what, was in asked.items():
            if not was:
                raise EvaluationError(
                    f"lm-evaluation-harness {version('lm-eval')} handles {what} where quantkit cannot limit them",
                    "install lm-eval 0.4.13, or set model.trust_remote_code if you trust the tasks",
                )
        refused.clear()
        yield refused


def _score_probe() -> None:
    """Score a task of one document that has everything that a stand-in is for."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    manager, log = TaskManager(include_defaults=False), logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.CRITICAL)  # that there is no such metric
    try:
        evaluate(_Echo(), manager.load([_probe("exact_match")]), log_samples=False, bootstrap_iters=0)
        manager.load([_probe(PROBE)])
    finally:
        log.setLevel(level)


def _probe(metric: str) -> dict[str, Any]:
    from datasets import Dataset

    return {
        "task": PROBE,
        "custom_dataset": lambda **_: {"test": Dataset.from_list([{"word": "7"}])},
        "test_split": "test",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_text": "{{word}}",
        "doc_to_target": "{{word}}",
        "filter_list": [
            {"name": "found", "filter": [{"function": "regex", "regex_pattern": "(.*)"}, {"function": "take_first"}]}
        ],
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": [","]}
        ],
    }


class _Echo:
    """A model that answers with the question."""

    rank, world_size = 0, 1

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return [request.args[0] for request in requests]


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

    asked = False

    def from_string(self, source: str) -> Template:
        """A template; it is first read when it is rendered."""
        self.asked = True
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
    asked = False

    def compile(self, pattern: str, flags: int = 0) -> Pattern:
        """A pattern.

        Raises:
            re.error: it is none.
        """
        self.asked = True
        re.compile(pattern, flags)
        return Pattern(pattern, int(flags))

    def findall(self, pattern: str, string: str, flags: int = 0) -> list[Any]:
        """All matches.

        Raises:
            EvaluationError: it does not end.
        """
        return self.compile(pattern, flags).findall(string)

    def sub(self, pattern: str, repl: str, string: str, flags: int = 0) -> str:
        """The text with each match replaced.

        Raises:
            EvaluationError: it does not end.
        """
        self.asked = True
        return _judged(pattern, lambda: substitute(pattern, repl, string, int(flags)))


def _judged(pattern: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except TemplateFailure as error:
        raise EvaluationError(f"the pattern '{pattern[:80]}' of a task fails: {error}", "mend the task") from error
