"""Tasks of lm-evaluation-harness, scored on a loaded model.

The package reads its tasks, builds the prompts and judges the answers; :mod:`quantkit.evaluation.harness` gives it the
model. Unless remote code is trusted, templates and patterns run in a process of their own, and metrics that it would
fetch from the Hugging Face hub as scripts are refused, see :mod:`quantkit.evaluation.task_sandbox`.
"""

from __future__ import annotations

import difflib
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.errors import EvaluationError, MissingDependencyError
from quantkit.evaluation.harness import HarnessModel
from quantkit.evaluation.task_files import TaskFile, read_task
from quantkit.evaluation.task_sandbox import sandboxed
from quantkit.recipe import TaskSpec
from quantkit.runtimes.base import LoadedModel
from quantkit.system.artifacts import fingerprint
from quantkit.system.distribution import requirement
from quantkit.system.units import finite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
SEED = 1234
"""Of the order in which solved examples are drawn; lm-evaluation-harness's own default."""
BOOTSTRAP = 1000
"""Resamplings for the standard error of a metric that has no formula for it."""
CHECKSUM = "prompts_checksum"
LOWER, HIGHER = "task_losses", "tasks"
"""Where metrics stand of which less is better, and all others."""
_OFFLINE = "its data come from the Hugging Face hub: check the network, or give a task file with local data"
_WRONG = "see docs/evaluation.md#tasks for a task file that works"
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ImportError, RuntimeError, SyntaxError)
"""What the package raises for a task that is not right, or whose data are not to be had."""


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """What one entry of ``evaluation.tasks`` stands for.

    Attributes:
        spec: the entry.
        content: tasks and groups, as ``TaskManager.load`` gives them.
    """

    spec: TaskSpec
    content: dict[str, Any]


@contextmanager
def loaded_tasks(specs: Sequence[TaskSpec], *, trusted: bool) -> Iterator[list[LoadedTask]]:
    """The tasks with their data, for the time in which they are scored.

    Args:
        specs: entries of ``evaluation.tasks``; where there are none, nothing is imported.
        trusted: run Python code that tasks and metrics bring along.

    Raises:
        MissingDependencyError: lm-evaluation-harness is not installed.
        EvaluationError: there is no such task, its data cannot be had, or it wants code to be run.
    """
    if not specs:
        yield []
        return
    manager_class = _manager_class()
    with ExitStack() as stack:
        refused: list[str] = [] if trusted else stack.enter_context(sandboxed())
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quantkit-tasks-")))
        names = any(spec.name for spec in specs)
        manager = manager_class(include_defaults=names)
        yield [_load(spec, manager, scratch, refused, trusted=trusted) for spec in specs]


def check_task_names(specs: Sequence[TaskSpec]) -> None:
    """Check, before a model is loaded, that lm-evaluation-harness has the tasks that are named; takes seconds.

    Raises:
        MissingDependencyError: it is not installed.
        EvaluationError: it has no such task.
    """
    names = [spec.name for spec in specs if spec.file is None]
    if names:
        manager = _manager_class()()
        for name in names:
            _check_name(name, manager)


def score_tasks(
    tasks: Sequence[LoadedTask],
    model: LoadedModel,
    tokenizer: PreTrainedTokenizerBase,
    ends: frozenset[int],
    longest: int,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score a model on tasks.

    Args:
        tasks: from :func:`loaded_tasks`, inside its block.
        model: as a runtime has loaded it.
        tokenizer: the model's.
        ends: ids that end an answer.
        longest: tokens that the model reads at most.
        progress: called with ``task NAME``, requests done and their number.

    Returns:
        The metrics, ``tasks`` and ``task_losses`` as far as there are some, each by ``TASK.METRIC`` (with ``.FILTER``
        behind it, where a task has several) with ``value``, ``stderr`` (None where there is none), ``samples`` and
        ``prompts_checksum``, which two scores on the same prompts share (None for a group); and for each task its
        ``version``, ``fewshot``, ``limit`` and ``chat_template``.

    Raises:
        EvaluationError: a template fails on a document, a task wants sampling, or logits are NaN.
    """
    metrics: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for task in tasks:
        watched = _watcher(progress, f"task {task.spec.label}")
        length = min(task.spec.max_length, longest)
        found = _run(task, HarnessModel(model, tokenizer, ends, length, watched))
        sums = {name: _checksum(each) for name, each in task.content["tasks"].items()}
        for name, result in found["results"].items():
            _collect(metrics, name, {**result, CHECKSUM: sums.get(name)}, found["higher_is_better"].get(name) or {})
            facts[name] = {
                "version": found["versions"].get(name),
                "fewshot": found["n-shot"].get(name),
                "limit": task.spec.limit,
                "chat_template": task.spec.chat_template,
            }
    return metrics, facts


def _watcher(progress: Progress, label: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(label, done, total)


def _manager_class() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError("lm-eval", "scoring tasks", requirement("tasks")) from error
    return TaskManager


def _load(spec: TaskSpec, manager: Any, scratch: Path, refused: list[str], *, trusted: bool) -> LoadedTask:
    wanted: Any = spec.name
    is_local = False
    if spec.file is not None:
        file = read_task(Path(spec.file))
        wanted, is_local = _from_file(file, scratch, trusted=trusted), file.is_local
    else:
        _check_name(spec.name, manager)
    with _translated(spec, _WRONG if is_local else _OFFLINE):
        content = manager.load([wanted])
        for task in content["tasks"].values():
            if spec.fewshot is not None:
                task.set_config(key="num_fewshot", value=spec.fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
    if refused:
        raise EvaluationError(
            f"task {spec.label}: metric '{refused[0]}' is a script of the hub, which is Python code",
            "set model.trust_remote_code if you trust the code",
        )
    return LoadedTask(spec, content)


def _check_name(name: str | None, manager: Any) -> None:
    if name not in manager.task_index:
        raise EvaluationError(f"lm-evaluation-harness has no task '{name}'", _nearest(name, manager))


def _from_file(file: TaskFile, scratch: Path, *, trusted: bool) -> dict[str, Any]:
    """A task file as the configuration that the package takes."""
    from lm_eval.tasks._yaml_loader import load_yaml

    file.check(trusted=trusted)
    config = dict(load_yaml(file.path)) if file.code else dict(file.config)
    if file.is_local:
        kwargs = {**(config.get("dataset_kwargs") or {}), "data_files": file.data_files()}
        config["dataset_kwargs"] = {**kwargs, "cache_dir": str(scratch)}
    return config


def _nearest(name: str | None, manager: Any) -> str:
    near = difflib.get_close_matches(str(name), manager.all_tasks, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return f"{hint}'lm-eval ls tasks' lists all; a task of your own is given as {{file: task.yaml}}"


def _run(task: LoadedTask, model: HarnessModel) -> dict[str, Any]:
    import jinja2
    from lm_eval.evaluator import evaluate

    random.seed(0)
    np.random.seed(SEED)  # some tasks draw from its global generator
    try:
        found: dict[str, Any] = evaluate(
            model,
            task.content,
            limit=task.spec.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
            apply_chat_template=task.spec.chat_template,
            fewshot_as_multiturn=task.spec.chat_template,
        )
    except jinja2.TemplateError as error:
        raise EvaluationError(f"task {task.spec.label}: a template fails: {error}", "mend the task") from error
    return found


def _collect(metrics: dict[str, Any], task: str, result: Mapping[str, Any], higher: Mapping[str, Any]) -> None:
    """Sort the figures of a task into ``metrics``; the package names them ``METRIC,FILTER``."""
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        number = finite(value)
        if not comma or metric.endswith("_stderr") or number is None:
            continue
        place = metrics.setdefault(LOWER if higher.get(metric) is False else HIGHER, {})
        name = f"{task}.{metric}" if kind == "none" else f"{task}.{metric}.{kind}"
        place[name] = {
            "value": number,
            "stderr": finite(result.get(f"{metric}_stderr,{kind}")),
            "samples": result.get("sample_len"),
            CHECKSUM: result[CHECKSUM],
        }


def _checksum(task: Any) -> int:
    """The first 48 bits of the SHA-256 of everything that a task asked the model."""
    asked = [[each.request_type, *each.args] for each in task.instances]
    return int(fingerprint(json.loads(json.dumps(asked, default=str)))[:12], 16)


@contextmanager
def _translated(spec: TaskSpec, remedy: str) -> Iterator[None]:
    """Turn what the package raises for a task that cannot be loaded into one line."""
    import jinja2

    try:
        yield
    except (jinja2.TemplateError, *_BROKEN) as error:
        text = f"{type(error).__name__}: {error}"
        raise EvaluationError(f"task {spec.label} cannot be loaded: {text}", remedy) from error
