"""What the bytes of a library's checkpoint depend on."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantizationError
from quantkit.isolation.launch import plugin_place
from quantkit.isolation.lockfile import read_lock
from quantkit.quantization import Job
from quantkit.system.artifacts import file_sha256
from quantkit.system.devices import resolve_device

if TYPE_CHECKING:
    from quantkit.recipe import LibrarySpec

CODE_VERSION = 1
"""Part of the fingerprint: raised when the same output of a library would give another checkpoint."""
STACK = ("torch", "transformers")
"""Packages of the caller's environment that a result in it depends on, beside the library."""
OWN_KEYS = {"name", "env", "limits"}
"""Keys of a variant that do not change its bytes."""


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
