"""One variant that a library shall quantize, and the interpreter for it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError
from quantkit.isolation.environments import environment_of
from quantkit.isolation.install import announcement, install
from quantkit.isolation.launch import Place
from quantkit.quantization import Job

if TYPE_CHECKING:
    from quantkit.libraries import Library
    from quantkit.recipe import LibrarySpec
    from quantkit.system.progress import Observer


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
