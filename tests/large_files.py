"""Refuses files of more than 1 MB: ``python -m tests.large_files [FILE ...]``; of all that git tracks by default."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 1_000_000


def tracked(folder: Path) -> list[Path]:
    """The files that git tracks in a folder, those that are there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=folder, capture_output=True, check=True).stdout
    return [path for name in listed.decode().split("\0") if name and (path := folder / name).is_file()]


def too_large(files: Iterable[Path]) -> list[str]:
    """A line for each file over the limit."""
    sizes = {path: path.stat().st_size for path in files if not path.is_symlink()}
    return [f"{path}: {size:,} bytes, and {LIMIT:,} are allowed" for path, size in sizes.items() if size > LIMIT]


if __name__ == "__main__":
    found = too_large([Path(name) for name in sys.argv[1:]] or tracked(ROOT))
    sys.exit("\n".join(found) or None)
