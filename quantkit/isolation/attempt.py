"""One variant that a library shall quantize: its interpreter, its device, and what its bytes depend on."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantizationError, QuantkitError
from quantkit.isolation.environments import environment_of
from quantkit.isolation.install import announcement, install
from quantkit.isolation.launch import Place, plugin_place
from quantkit.isolation.lockfile import read_lock
from quantkit.quantization import Job
from quantkit.system.artifacts import file_sha256
from quantkit.system.devices import resolve_device

if TYPE_CHECKING:
    from quantkit.libraries import Library
    from quantkit.recipe import LibrarySpec
    from quantkit.system.progress import Observer

CODE_VERSION = 1
"""Part of the fingerprint: raised when the same output of a library would give another checkpoint."""
STACK = ("torch", "transformers")
"""Packages of the caller's environment that a result in it depends on, beside the library."""
OWN_KEYS = {"name", "title", "env", "limits"}
"""Keys of a variant that do not change its bytes."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One variant that a library shall quantize.

    Attributes:
        job: the float model and the calibration set.
        variant: what is asked for.
        out: folder of the checkpoint.
        log: file for all that the worker prints.
        observer: is told what happens.
        installs: whether the library's environment may be made now.
    """

    job: Job
    variant: LibrarySpec
    out: Path
    log: Path
    observer: Observer
    installs: bool = True


def place_for(attempt: Attempt) -> Place:
    """The interpreter in which a variant is quantized; an environment that is not there is made, if that is allowed.

    Raises:
        QuantkitError: it is not there and may not be made, or cannot be.
    """
    library = attempt.variant.plugin
    if attempt.variant.env == "current":
        return Place(Path(sys.executable), own=False)
    found = environment_of(library)
    if found.state != "ready":
        if not attempt.installs:
            raise not_installed([library])
        found = install(library, attempt.observer)
    return Place(found.python, own=True)


def not_installed(libraries: list[type[Library]]) -> QuantkitError:
    """That environments are absent and may not be made."""
    what = "; ".join(announcement(library) for library in libraries)
    names = " ".join(library.name for library in libraries)
    return QuantkitError(f"not installed: {what}", f"quantkit env install {names}, or leave out --no-install")


def made_from(job: Job, variant: LibrarySpec) -> dict[str, Any]:
    """What the bytes of a variant depend on, for its fingerprint.

    Raises:
        QuantkitError: the library has no lock, or is not installed here though it shall run here.
    """
    library = variant.plugin
    place = plugin_place(library)
    module = sys.modules[library.__module__].__file__
    return {
        "code": CODE_VERSION,
        "source": job.source_facts,
        "dtype": job.dtype,
        "variant": {key: value for key, value in variant.resolved().items() if key not in OWN_KEYS},
        "environment": environment_facts(variant),
        "plugin": {"class": place["class"], "sha256": file_sha256(Path(str(module)))},
        "device": device_for(variant, job),
        "calibration": job.calibration_sha256 if variant.calibrated else None,
    }


def environment_facts(variant: LibrarySpec) -> dict[str, Any]:
    """What identifies the environment in which a variant is quantized."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if variant.env == "own":
        return {"lock": read_lock(variant.plugin).digest, "python": python}
    found = {}
    for name in (variant.plugin.distribution, *STACK):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return {"packages": found, "python": platform.python_version()}


def device_for(variant: LibrarySpec, job: Job) -> str:
    """Where the library quantizes: the run's device, or the CPU where it is left open and the library needs that.

    Raises:
        QuantizationError: the method does not run on the device.
    """
    device, able = resolve_device(job.device), variant.offer.devices
    if device.type in able:
        return str(device)
    if job.device == "auto" and "cpu" in able:
        return "cpu"
    raise QuantizationError(
        f"{variant.label} quantizes on {' and '.join(able)} alone, and the device here is {device.type}",
        "run it on a machine that has it, or leave the variant out",
    )
