"""Make the environment of a library, by uv."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from quantkit.errors import MissingDependencyError, OutputError, QuantkitError
from quantkit.isolation.environments import MARKER, Environment, cache_folder, environment_of, interpreter, size_of
from quantkit.isolation.lockfile import Lock, read_lock
from quantkit.libraries import Library
from quantkit.system.artifacts import translated_os_errors, write_json
from quantkit.system.distribution import requirement
from quantkit.system.locks import held
from quantkit.system.progress import Observer

DISK_FULL = ("no space left on device", "os error 28", "disk quota exceeded")
NO_NETWORK = ("dns error", "error sending request", "failed to fetch", "connection refused", "network is unreachable",
              "timed out", "offline")  # fmt: skip
BAD_HASH = ("hash mismatch", "hash-checking")


def uv_command() -> list[str]:
    """How uv is called.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        from uv import find_uv_bin
    except ModuleNotFoundError:
        found = shutil.which("uv")
    else:
        found = find_uv_bin()
    if found is None:
        raise MissingDependencyError("uv", "an environment for a library", requirement("libraries"))
    return [found]


def announcement(library: type[Library]) -> str:
    """What an installation will fetch, in words.

    Raises:
        QuantkitError: the library has no lock.
    """
    lock = read_lock(library)
    version = lock.packages.get(library.distribution, "")
    return f"{library.name} {version} ({lock.describe()}), into {environment_of(library).folder}"


def install(library: type[Library], observer: Observer) -> Environment:
    """The environment of a library, made if it is not ready.

    Raises:
        MissingDependencyError: uv is not installed.
        OutputError: another process makes it, the disk is full.
        QuantkitError: there is no network, a file has another hash than the lock says, or anything else that uv says.
    """
    found = environment_of(library)
    if found.state == "ready":
        return found
    uv_command()
    with held(found.folder, f"installing {library.name}"):
        again = environment_of(library)
        if again.state == "ready":
            return again
        observer.stage(f"install: {announcement(library)}")
        with translated_os_errors(found.folder):
            shutil.rmtree(found.folder, ignore_errors=True)
        try:
            _make(library, read_lock(library), found.folder)
        except BaseException:
            shutil.rmtree(found.folder, ignore_errors=True)
            raise
    return environment_of(library)


def _make(library: type[Library], lock: Lock, folder: Path) -> None:
    log = cache_folder() / "logs" / f"install-{library.name}.log"
    with translated_os_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    _uv(library, log, "venv", "--no-project", "--python", sys.executable, str(folder))
    python = str(interpreter(folder))
    given = ("--require-hashes", "--no-deps", "--requirement", str(lock.path))
    _uv(library, log, "pip", "install", "--python", python, *given)
    listed = _uv(library, log, "pip", "list", "--python", python, "--format", "json")
    packages = {each["name"]: each["version"] for each in json.loads(listed)}
    version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    facts = {"library": library.name, "lock": lock.digest, "python": version, "packages": packages}
    write_json(folder / MARKER, {**facts, "size_bytes": size_of(folder)})


def _uv(library: type[Library], log: Path, *arguments: str) -> str:
    """Run uv; what it prints on standard output."""
    with log.open("ab") as stream:
        child = subprocess.Popen(
            [*uv_command(), *arguments],
            env=_uv_environment(cache_folder()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
        )
        try:
            told, _ = child.communicate()
        except BaseException:
            child.kill()
            child.wait()
            raise
    if child.returncode:
        raise _translated(library, log)
    return told


def _uv_environment(cache: Path) -> dict[str, str]:
    """The variables with which uv runs: environments beside each other share the files of one cache.

    Args:
        cache: quantkit's cache folder; uv keeps its own in there, so that files can be hard links.
    """
    return {**os.environ, "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(cache / "uv")), "UV_NO_CONFIG": "1"}


def _translated(library: type[Library], log: Path) -> QuantkitError:
    """What uv said, in one line with the remedy."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    what, whole = f"the environment of {library.name} cannot be installed", f"the whole message is in {log}"
    lowered = text.lower()
    if any(words in lowered for words in DISK_FULL):
        return OutputError(f"{what}: the disk is full", "free some space, or name another disk in QUANTKIT_CACHE")
    if any(words in lowered for words in BAD_HASH):
        return QuantkitError(
            f"{what}: a file that was fetched is not the one that {library.name}.lock names", f"do not use it; {whole}"
        )
    if any(words in lowered for words in NO_NETWORK):
        return QuantkitError(f"{what}: the package index cannot be reached", f"check the network; {whole}")
    first = next((line for line in lines if line.lower().startswith("error")), lines[-1] if lines else "")
    return QuantkitError(f"{what}: {first.removeprefix('error: ')}", whole)
