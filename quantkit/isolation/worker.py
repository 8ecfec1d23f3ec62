"""The process in which a library quantizes: ``PYTHON worker.py JOB.json``, with the library's interpreter.

quantkit may be installed among packages that must not be seen here, so its folder is not put on the path: the package
is loaded from its own files, and of it no more than :mod:`quantkit.libraries`, :mod:`quantkit.system.registry`,
:mod:`quantkit.system.worker`, :mod:`quantkit.errors`, and what a plugin asks for that needs no more packages than its
library brings, such as :mod:`quantkit.gguf.writer`. The module of a third party's plugin is loaded in the same way.

The job is that of :func:`quantkit.isolation.launch.launch`; the result is left beside it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

EXIT_FAILED = 1
FIRST_TO_GO = "1000"
"""For ``oom_score_adj``: where memory ends, the kernel takes this process before the one that waits for it."""
RECORDED = ("torch", "transformers", "safetensors", "numpy")


def main(arguments: list[str]) -> int:
    """Carry out the job in the file ``arguments[0]``; returns the exit code."""
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    adopt("quantkit", Path(job["quantkit"]))
    from quantkit.system.worker import RESULT_FILE, live_no_longer_than_the_parent, progress_channel

    live_no_longer_than_the_parent()
    report = progress_channel()
    faulthandler.enable()
    with contextlib.suppress(OSError):  # not on Linux, or not allowed
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_GO, encoding="ascii")
    result: dict[str, Any]
    try:
        result = perform(job, report)
    except Exception as error:  # whatever a library raises is told to the parent, and its traceback to the log
        import traceback

        traceback.print_exc()
        result = {"error": {"kind": type(error).__name__, "problem": str(error), "memory": _is_memory(error)}}
    _write(Path(arguments[0]).with_name(RESULT_FILE), result)
    sys.stdout.flush()
    sys.stderr.flush()
    # libraries leave threads and exit handlers that can hang; all that counts is on disk
    os._exit(EXIT_FAILED if "error" in result else 0)


def perform(job: Mapping[str, Any], report: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Quantize; returns what the library used, its versions, seconds and what was asked of torch at its peak."""
    library = load_plugin(job["plugin"])
    from quantkit.libraries.base import Request

    fields = {**job["request"], "ignore": tuple(job["request"]["ignore"]), "progress": report}
    for key in ("model", "out"):
        fields[key] = Path(fields[key])
    started = time.perf_counter()
    used = library().quantize(Request(**fields))
    return {
        "used": {"samples": used.samples, "tokens": used.tokens, "notes": list(used.notes)},
        "seconds": time.perf_counter() - started,
        "versions": versions(library.distribution),
        "cuda_peak_bytes": _cuda_peak(),
    }


def adopt(name: str, folder: Path) -> ModuleType:
    """Import a package from its folder, or a module from its file, without a path that leads to its neighbours."""
    is_package = folder.is_dir()
    spec = importlib.util.spec_from_file_location(
        name,
        folder / "__init__.py" if is_package else folder,
        submodule_search_locations=[str(folder)] if is_package else None,
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"no module {name} can be loaded from {folder}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_plugin(plugin: Mapping[str, str]) -> Any:
    """The class of a plugin, from its own files."""
    module = plugin["module"]
    top = module.partition(".")[0]
    if top != "quantkit":
        adopt(top, Path(plugin["top"]))
    found: Any = importlib.import_module(module)
    for part in plugin["class"].split("."):
        found = getattr(found, part)
    return found


def versions(distribution: str) -> dict[str, str]:
    """The library, Python, and what most libraries stand on."""
    found = {"python": platform.python_version()}
    for name in (distribution, *RECORDED):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _is_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's own, or torch's for either device."""
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return out_of_memory or "can't allocate memory" in str(error)


def _cuda_peak() -> int | None:
    """Bytes that torch had reserved on its device at the peak, if the library ran it on one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_reserved())


def _write(file: Path, result: Mapping[str, Any]) -> None:
    """The result is there whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result), encoding="utf-8")
    os.replace(partial, file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
