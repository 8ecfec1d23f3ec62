"""The lock file of a library: all packages of its environment, pinned, with hashes.

It is a requirements file that ``make locks`` wrote, see ``tests/lock_files.py``. Its comments say how it was made and
how much is fetched; they are no part of its identity.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import QuantkitError
from quantkit.system.units import in_units

if TYPE_CHECKING:
    from quantkit.libraries import Library

DOWNLOAD = re.compile(r"^# download: (\d+) bytes for (\d+) package", re.MULTILINE)
PINNED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Lock:
    """What an environment holds.

    Attributes:
        path: of the file.
        digest: SHA-256 of its lines without comments.
        packages: names with their versions; of a package that differs between systems the last.
        download: how many packages are fetched into an empty cache on Linux x86-64, and their bytes; None where the
            file does not say.
    """

    path: Path
    digest: str
    packages: dict[str, str]
    download: tuple[int, int] | None

    def describe(self) -> str:
        """How many packages there are, and how much is fetched for them."""
        if self.download is None:
            return f"{len(self.packages)} packages or fewer"
        count, size = self.download
        return f"{count} package{'' if count == 1 else 's'}, {in_units(size)} to fetch at most"


def lock_path(library: type[Library]) -> Path:
    """``NAME.lock`` beside the module of a library.

    Raises:
        QuantkitError: the module has no file.
    """
    file = getattr(sys.modules[library.__module__], "__file__", None)
    if file is None:
        raise QuantkitError(f"library '{library.name}' is not in a file, so that it can have no lock beside it")
    return Path(file).with_name(f"{library.name}.lock")


def read_lock(library: type[Library]) -> Lock:
    """The lock of a library.

    Raises:
        QuantkitError: there is none, or it cannot be read.
    """
    path = lock_path(library)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuantkitError(
            f"library '{library.name}' has no environment of its own: {path} cannot be read",
            "use env: current, where the library is installed beside quantkit",
        ) from error
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    size = DOWNLOAD.search(text)
    return Lock(
        path,
        hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        dict(PINNED.findall("\n".join(lines))),
        (int(size[2]), int(size[1])) if size else None,
    )
