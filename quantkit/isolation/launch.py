"""A worker: its interpreter, its variables, its job, and how it failed."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from quantkit.errors import QuantizationError, QuantkitError
from quantkit.libraries import Library
from quantkit.system import threads
from quantkit.system.child import Limits, run_child
from quantkit.system.ending import Ending, Kind
from quantkit.system.units import in_units
from quantkit.system.worker import Report

WORKER = Path(__file__).with_name("worker.py")
PACKAGE = Path(__file__).resolve().parents[1]
"""quantkit's own folder."""
FREE_SHARE = 0.9
"""Share of the free memory that a worker may take where no limit is given."""
PASSED = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TERM",
    "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER",
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "CC", "CXX", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR",
)  # fmt: skip
"""Variables of this process that a worker has too. No other goes along, so that no token does."""
PASSED_PREFIXES = ("LC_", "NVIDIA_")
PASSED_TO_CURRENT = ("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX")
FIXED = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_TOKEN_PATH": os.devnull,
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONHASHSEED": "0",
}
"""Variables that every worker has with these values."""


class WorkerFailedError(QuantizationError):
    """A library left no checkpoint that can be used.

    Args:
        problem: how it ended.
        remedy: what the user can do.
        facts: for the report, see :func:`ending_facts`.
    """

    def __init__(self, problem: str, remedy: str = "", *, facts: dict[str, Any]) -> None:
        super().__init__(problem, remedy)
        self.facts = facts


@dataclass(frozen=True, slots=True)
class Place:
    """Where a library runs.

    Attributes:
        python: interpreter.
        own: it is the library's own environment.
    """

    python: Path
    own: bool


def fixed_variables(library: type[Library], device: str) -> dict[str, str]:
    """The variables that are fixed for a library, and recorded."""
    count = threads.count(os.environ)
    counts = dict.fromkeys((threads.COUNT, "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(count))
    return {**FIXED, **counts, **library.variables(count, device)}


def environment(place: Place, fixed: dict[str, str]) -> dict[str, str]:
    """All variables of a worker."""
    wanted = PASSED if place.own else (*PASSED, *PASSED_TO_CURRENT)
    passed = {key: value for key, value in os.environ.items() if key in wanted or key.startswith(PASSED_PREFIXES)}
    return {**passed, **fixed}


def plugin_place(library: type[Library]) -> dict[str, str]:
    """Where a plugin's module is, for an interpreter that does not see it.

    Raises:
        QuantkitError: its files cannot be told.
    """
    module = library.__module__
    top = sys.modules[module.partition(".")[0]]
    file = getattr(top, "__file__", None)
    if module == "__main__" or file is None:
        raise QuantkitError(f"library '{library.name}' is not in a module of its own", "put it into a file")
    path = Path(file).resolve()
    where = path.parent if path.name == "__init__.py" else path
    return {"module": module, "class": library.__qualname__, "top": str(where)}


def launch(
    library: type[Library],
    place: Place,
    request: dict[str, Any],
    fixed: dict[str, str],
    *,
    scratch: Path,
    limits: Limits,
    log: Path,
    on_progress: Report,
) -> Ending:
    """Run a library in a worker.

    Args:
        library: whose ``quantize`` runs.
        place: where.
        request: the fields of :class:`quantkit.libraries.base.Request` but for ``progress``, as JSON data.
        fixed: see :func:`fixed_variables`.
        scratch: folder for the job and its result, and the worker's working folder, so that what a library writes
            beside itself is not left with the user.
        limits: what it may take; of memory a share of what is free, where they do not say.
        log: file for all that it prints.
        on_progress: is told how far it is.
    """
    memory = limits.memory_bytes or int(FREE_SHARE * psutil.virtual_memory().available)
    alone = ["-s"] if place.own else []
    return run_child(
        [str(place.python), "-P", *alone, str(WORKER)],
        {"quantkit": str(PACKAGE), "plugin": plugin_place(library), "request": request},
        scratch.absolute(),
        environment=environment(place, fixed),
        log=log,
        limits=replace(limits, memory_bytes=memory),
        cwd=scratch,
        on_progress=on_progress,
    )


def ending_facts(ending: Ending) -> dict[str, Any]:
    """How a worker ended, for the report."""
    return {
        "ending": ending.kind.value,
        "status": ending.status,
        "seconds": ending.seconds,
        "peak_bytes": ending.peak_bytes,
        "log": str(ending.log),
    }


def failure(ending: Ending, name: str) -> WorkerFailedError:
    """Why there is no checkpoint, in one line with a remedy.

    Args:
        ending: of the worker.
        name: of library and method.
    """
    return WorkerFailedError(*_words(ending, name), facts=ending_facts(ending))


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
                f"{name} was ended: it was not done after {ending.limit}; last line of its log: {ending.last_line()}",
                f"raise limits.time if it was still at work; {log}",
            )
        case Kind.SIGNAL:
            return (
                f"{name} was killed by {ending.how}; last line of its log: {ending.last_line()}",
                log,
            )
        case Kind.ERROR | Kind.NO_MEMORY:
            error = (ending.result or {}).get("error")
            told = f"{error['kind']}: {error['problem']}" if error else ending.last_error()
            what = "ran out of memory" if ending.kind is Kind.NO_MEMORY else "failed"
            return f"{name} {what}: {told}", f"the traceback is in its log, {ending.log}"
        case _:
            return (
                f"{name} ended with {ending.how} and without a result; last line of its log: {ending.last_line()}",
                log,
            )
