"""Writes the lock files of library plugins: ``python -m tests.lock_files [NAME...]``, or ``make locks``.

A lock stands beside the plugin's module and pins all that its ``requirements`` need, for every system and every Python
that quantkit runs on, with the hashes of the files. Versions that a lock has already are kept where they still suit;
``--upgrade`` takes the newest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.markers import Marker
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from quantkit.isolation.install import uv_command
from quantkit.isolation.lockfile import lock_path
from quantkit.libraries import LIBRARIES, Library

PYTHON = "3.11"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="libraries; all by default")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that suit")
    given = parser.parse_args()
    for name in given.names or [library.name for library in LIBRARIES if library.requirements]:
        library = LIBRARIES.get(name)
        packages, size = write_lock(library, upgrade=given.upgrade)
        sys.stdout.write(f"{lock_path(library)}: {packages} packages, {size / 1e6:.0f} MB to fetch\n")
        sys.stdout.flush()


def write_lock(library: type[Library], *, upgrade: bool = False) -> tuple[int, int]:
    """Write a library's lock; returns how many packages it has here, and the bytes that they are fetched with."""
    lock = lock_path(library)
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "requirements.in"
        wanted.write_text("".join(f"{line}\n" for line in library.requirements), encoding="utf-8")
        pinned = Path(scratch) / "requirements.txt"
        if lock.exists() and not upgrade:
            pinned.write_bytes(lock.read_bytes())  # uv keeps what an output file pins
        compile_lock(wanted, pinned, "--generate-hashes")
        sized = Path(scratch) / "pylock.toml"
        compile_lock(wanted, sized, "--constraint", str(pinned))
        packages, size = downloads(tomllib.loads(sized.read_text(encoding="utf-8")))
        header = [
            f"# {library.name}: made by 'python -m tests.lock_files {library.name}' of",
            *(f"#   {line}" for line in library.requirements),
            f"# with uv pip compile --universal --generate-hashes --python-version {PYTHON}",
            f"# download: {size} bytes for {packages} packages on Linux x86-64 with Python {PYTHON}",
        ]
        text = "\n".join([*header, pinned.read_text(encoding="utf-8")])
    lock.write_text(text, encoding="utf-8")
    return packages, size


def compile_lock(wanted: Path, out: Path, *options: str) -> None:
    command = [*uv_command(), "pip", "compile", str(wanted), "--universal", "--python-version", PYTHON]
    kept = ["--no-annotate", "--no-header", "--quiet", "--output-file", str(out)]
    subprocess.run([*command, *kept, *options], check=True)


def downloads(lock: dict[str, Any]) -> tuple[int, int]:
    """How many packages this interpreter would install, and the bytes of the file of each."""
    packages = [each for each in lock["packages"] if "marker" not in each or Marker(each["marker"]).evaluate()]
    ranks = {tag: rank for rank, tag in reversed(list(enumerate(sys_tags())))}

    def rank(wheel: dict[str, Any]) -> int:
        name = wheel.get("name") or unquote(Path(urlsplit(wheel["url"]).path).name)
        try:
            return min((ranks.get(tag, len(ranks)) for tag in parse_wheel_filename(name)[3]), default=len(ranks))
        except InvalidWheelFilename:
            return len(ranks)

    def size(package: dict[str, Any]) -> int:
        wheels: Sequence[dict[str, Any]] = sorted(package.get("wheels", ()), key=rank)
        chosen = wheels[0] if wheels and rank(wheels[0]) < len(ranks) else package.get("sdist", {})
        return int(chosen.get("size", 0))

    return len(packages), sum(map(size, packages))


if __name__ == "__main__":
    main()
