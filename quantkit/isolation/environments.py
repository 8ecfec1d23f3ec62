"""Environments of libraries on this machine: where they are, and in what state.

An environment is a virtual environment called by its library, the digest of its lock and the version of Python, so
that another lock gives another environment. It is made in place, as virtual environments cannot be moved; the file
``quantkit.json``, written last, says that it is whole.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from quantkit.errors import OutputError
from quantkit.isolation.lockfile import Lock, read_lock
from quantkit.libraries import LIBRARIES, Library
from quantkit.system.artifacts import read_json, translated_os_errors
from quantkit.system.locks import held

MARKER = "quantkit.json"
PROBE_SECONDS = 60
VARIABLE = "QUANTKIT_CACHE"
State = Literal["ready", "absent", "outdated", "broken"]
_NAME = re.compile(r"(.+)-([0-9a-f]{12})-py(\d+\.\d+)")


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment of a library, which need not be there.

    Attributes:
        library: its name.
        folder: where it is, or would be.
        state: ``ready``; ``absent``; ``outdated``, where there is one of an older lock alone; ``broken``.
        why: it is broken.
        facts: ``packages``, ``size_bytes``, ``lock`` and ``python`` of one that is ready.
    """

    library: str
    folder: Path
    state: State
    why: str
    facts: dict[str, Any]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return interpreter(self.folder)


def cache_folder() -> Path:
    """The folder named by ``QUANTKIT_CACHE``, else ``quantkit`` in the user's cache folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "quantkit"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "quantkit"


def environment_of(library: type[Library]) -> Environment:
    """The environment that the library's lock asks for.

    Raises:
        QuantkitError: the library has no lock.
    """
    folder = place_of(library, read_lock(library))
    facts, why = _inspected(folder)
    if facts is not None:
        return Environment(library.name, folder, "ready", "", facts)
    if why:
        return Environment(library.name, folder, "broken", why, {})
    older = any(name == library.name for name, _ in folders())
    return Environment(library.name, folder, "outdated" if older else "absent", "", {})


def place_of(library: type[Library], lock: Lock) -> Path:
    """The folder of an environment."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return root() / f"{library.name}-{lock.digest[:12]}-py{version}"


def root() -> Path:
    """The folder of all environments."""
    return cache_folder() / "environments"


def folders() -> list[tuple[str, Path]]:
    """All environments that are there, whole or not, with the names of their libraries."""
    if not root().is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in sorted(root().iterdir()) if path.is_dir())
    return [(match[1], path) for match, path in found if match]


def listed() -> list[Environment]:
    """The environment of every library that has a lock, and what is left of others."""
    own = [environment_of(library) for library in LIBRARIES if _has_lock(library)]
    places = {each.folder for each in own}
    rest = [
        Environment(name, path, "outdated", "", _inspected(path)[0] or {})
        for name, path in folders()
        if path not in places
    ]
    return sorted([*own, *rest], key=lambda each: (each.library, str(each.folder)))


def remove(name: str) -> list[Path]:
    """Remove all environments of a library, and return their folders.

    Raises:
        OutputError: one is being made, is in use, or cannot be removed.
    """
    gone = [path for library, path in folders() if library == name]
    for path in gone:
        users = [str(process.pid) for process in psutil.process_iter() if _runs_from(process, path)]
        if users:
            raise OutputError(f"{path} is in use by process {', '.join(users)}", "wait for its end")
        with held(path, "removing it"), translated_os_errors(path):
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path)
    return gone


def interpreter(folder: Path) -> Path:
    """The interpreter of an environment."""
    return folder / "bin" / "python"


def size_of(folder: Path) -> int:
    """Bytes of all files below; those that are hard links into uv's cache count like others."""
    return sum((Path(place) / name).lstat().st_size for place, _, names in os.walk(folder) for name in names)


def _runs_from(process: psutil.Process, folder: Path) -> bool:
    """Whether a process was started with the interpreter of an environment; those of other users may not be asked."""
    try:
        return process.cmdline()[:1] == [str(interpreter(folder))]
    except psutil.Error:
        return False


def _has_lock(library: type[Library]) -> bool:
    from quantkit.isolation.lockfile import lock_path

    return lock_path(library).is_file()


def _inspected(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """What the marker of an environment says, or why it cannot be used; neither where there is none."""
    if not folder.exists():
        return None, ""
    try:
        facts: dict[str, Any] = read_json(folder / MARKER)
        wanted = {"packages": dict, "size_bytes": int, "python": str}
        whole = all(isinstance(facts[key], kind) for key, kind in wanted.items())
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        return None, "its installation did not come to its end"
    try:
        asked = [str(interpreter(folder)), "-I", "-c", "import platform; print(platform.python_version())"]
        probe = subprocess.run(asked, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"its interpreter does not start: {error}"
    if probe.returncode:
        return None, "its interpreter does not start"
    return facts, ""
