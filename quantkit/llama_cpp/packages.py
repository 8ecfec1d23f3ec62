"""Where a Python package keeps the shared library of llama.cpp; found without importing the package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Carrier:
    """A package that brings llama.cpp.

    Attributes:
        module: what would be imported.
        distribution: what is installed.
        patterns: files that hold the C API, relative to the package; on every system one of them matches.
    """

    module: str
    distribution: str
    patterns: tuple[str, ...]


LIBRARY_NAMES = ("libllama.so", "libllama.dylib", "llama.dll")
CARRIERS = (
    Carrier("xllamacpp", "xllamacpp", ("xllamacpp*.so", "xllamacpp*.pyd")),
    Carrier("llama_cpp", "llama-cpp-python", tuple(f"lib/{name}" for name in LIBRARY_NAMES)),
    Carrier("llama_cpp_py_sync", "llama-cpp-py-sync", LIBRARY_NAMES),
)
"""In the order in which they are tried. In xllamacpp's extension module llama.cpp is linked in whole."""


@dataclass(frozen=True, slots=True)
class Found:
    """A shared library on disk.

    Attributes:
        path: the file.
        package: name and version of what brought it, such as ``xllamacpp 2026.10.11549``.
    """

    path: Path
    package: str


def installed() -> Iterator[Found]:
    """The shared libraries of llama.cpp that are installed, best first."""
    for carrier in CARRIERS:
        spec = importlib.util.find_spec(carrier.module)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            files = [path for pattern in carrier.patterns for path in sorted(Path(folder).glob(pattern))]
            yield from (Found(path, _named(carrier.distribution)) for path in files[:1])


def _named(distribution: str) -> str:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return distribution
