"""How a worker is started: its interpreter, its variables, its job."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantkit
from quantkit.errors import QuantkitError
from quantkit.isolation.outcome import Ending
from quantkit.isolation.supervise import Limits, Progress, run_worker
from quantkit.libraries import Library
from quantkit.system.artifacts import write_json

WORKER = Path(__file__).with_name("worker.py")
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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a library runs.

    Attributes:
        python: interpreter.
        own: it is the library's own environment.
    """

    python: Path
    own: bool


def cores() -> int:
    """Processors that a worker may use: those of this process, or fewer if ``OMP_NUM_THREADS`` says so."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(asked), there) if asked.isdigit() and int(asked) > 0 else there


def fixed_variables(library: type[Library], device: str) -> dict[str, str]:
    """The variables that are fixed for a library, and recorded."""
    count = cores()
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(count))
    return {**FIXED, **threads, **library.variables(count, device)}


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
    on_progress: Progress,
) -> Ending:
    """Run a library in a worker.

    Args:
        library: whose ``quantize`` runs.
        place: where.
        request: the fields of :class:`quantkit.libraries.base.Request` but for ``progress``, as JSON data.
        fixed: see :func:`fixed_variables`.
        scratch: folder for the job and its result.
        limits: what it may take.
        log: file for all that it prints.
        on_progress: is told how far it is.
    """
    result, job_file = scratch / "result.json", scratch / "job.json"

    def command(progress: int) -> list[str]:
        write_json(
            job_file,
            {
                "quantkit": str(Path(quantkit.__file__).resolve().parent),
                "plugin": plugin_place(library),
                "request": request,
                "result": str(result),
                "progress": progress,
            },
        )
        alone = ["-s"] if place.own else []
        return [str(place.python), "-P", *alone, str(WORKER), str(job_file)]

    return run_worker(command, result, environment(place, fixed), limits, log, on_progress)
