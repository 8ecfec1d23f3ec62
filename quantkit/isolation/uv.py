"""The package ``uv``, which makes environments and locks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from quantkit.errors import MissingDependencyError


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
        raise MissingDependencyError("uv", "an environment for a library", "'quantkit[libraries]'")
    return [found]


def uv_environment(cache: Path) -> dict[str, str]:
    """The variables with which uv runs: environments beside each other share the files of one cache.

    Args:
        cache: quantkit's cache folder; uv keeps its own in there, so that files can be hard links.
    """
    return {**os.environ, "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(cache / "uv")), "UV_NO_CONFIG": "1"}
