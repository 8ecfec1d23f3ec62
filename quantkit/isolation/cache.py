"""The folder for what quantkit keeps between runs on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "QUANTKIT_CACHE"


def cache_folder() -> Path:
    """The folder named by ``QUANTKIT_CACHE``, else ``quantkit`` in the user's cache folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "quantkit"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "quantkit"
