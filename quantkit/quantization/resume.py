"""A variant that goes on where an earlier run was cut short: the place of its segments, and whose they are."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from quantkit.quantization.job import Job, made_from
from quantkit.quantization.segments import SavedSegment, read_segments
from quantkit.recipe import VariantSpec
from quantkit.system.artifacts import fingerprint, read_json, translated_os_errors, write_json
from quantkit.system.devices import device_name, resolve_device
from quantkit.system.distribution import version_of

IDENTITY = "identity.json"
LAYOUT = 4
"""Raised when segments are stored in another way."""
PACKAGES = ("quantkit", "torch", "transformers", "numpy")
WORDS = {
    "source": "the model",
    "variant": "the variant's options",
    "calibration": "the calibration tokens",
    "inputs": "calibration.inputs",
    "experts": "calibration.experts",
    "generated": "calibration.generated",
    "written": "the tokens that the float model writes",
    "device": "the processor, its threads or the precision",
    "passes": "the processor, its threads or the precision",
    "machine": "the processor, its threads or the precision",
    "versions": "versions of packages",
    "packages": "versions of packages",
    "layout": "the version of quantkit",
    "code": "the version of quantkit",
}
"""What each part of a resume identity is, for a reader."""


@dataclass(frozen=True, slots=True)
class TakenUp:
    """What was found of an earlier run.

    Attributes:
        segments: those that are whole.
        total: how many there are to be.
        note: what the user should know; empty where nothing was found.
    """

    segments: Sequence[SavedSegment]
    total: int
    note: str


def layers_folder(out: Path) -> Path:
    """Where the finished segments of a variant wait: beside its checkpoint."""
    return out.absolute().parent / f".{out.name}.layers"


def resume_identity(job: Job, variant: VariantSpec) -> dict[str, Any]:
    """What the bytes of a segment depend on: all that those of the checkpoint do, and what it is computed with."""
    device = resolve_device(job.device)
    machine = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }
    written = {"written": fingerprint(job.written.rows)} if job.generates(variant) else {}
    return {**made_from(job, variant), **written, "layout": LAYOUT, "machine": machine, "packages": packages_of(device)}


def packages_of(device: torch.device) -> dict[str, str]:
    """The versions of the packages that compute; triton's kernels sum in an order of their own."""
    kernels = ("triton",) if device.type == "cuda" and find_spec("triton") else ()
    return {name: version_of(name) for name in (*PACKAGES, *kernels)}


def take_up(folder: Path, identity: Mapping[str, Any], names: Sequence[str]) -> TakenUp:
    """Open a layer store: what an earlier run with the same identity saved is kept, anything else is removed.

    The lock of the output is held, so that nobody else is at it.

    Args:
        folder: see :func:`layers_folder`.
        identity: see :func:`resume_identity`.
        names: the prefixes of all segments, in the order in which they are solved.

    Raises:
        OutputError: the folder cannot be written.
    """
    with translated_os_errors(folder):
        before = _identity_in(folder)
        if before is not None and fingerprint(before) == fingerprint(dict(identity)):
            segments, damage = read_segments(folder, names)
            return TakenUp(segments, len(names), _note(len(segments), len(names), damage))
        started = _is_begun(folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / IDENTITY, dict(identity))
    return TakenUp((), len(names), f"starts afresh: {_difference(before, identity)}" if started else "")


def drop_layers(out: Path) -> None:
    """Remove the finished segments of a variant that nobody will ask for."""
    shutil.rmtree(layers_folder(out), ignore_errors=True)


def is_worth_keeping(folder: Path) -> bool:
    """Whether a layer store holds a finished segment."""
    return any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir())


def _is_begun(folder: Path) -> bool:
    return folder.is_dir() and is_worth_keeping(folder)


def _identity_in(folder: Path) -> dict[str, Any] | None:
    try:
        found = read_json(folder / IDENTITY)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _note(done: int, total: int, damage: str) -> str:
    broken = f" (a saved one was damaged: {damage})" if damage else ""
    if not done:
        return f"starts afresh{broken}" if damage else ""
    return f"went on after a run that ended early, with {done} of {total} segments already solved{broken}"


def _difference(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Why what was saved is of no use."""
    if before is None:
        return "what an earlier run saved cannot be read"
    differing = [word for key, word in WORDS.items() if before.get(key) != now.get(key)]
    return f"an earlier run saved segments, and {' and '.join(dict.fromkeys(differing))} changed since"
