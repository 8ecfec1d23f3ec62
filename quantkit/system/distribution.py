"""The distribution that brings this package: its name for pip, its extras, its version, and others that are in the way.

The import and the command are ``quantkit``; what pip installs is :data:`NAME`, since the name ``quantkit`` is a
stranger's on PyPI. Every install line of quantkit's own is made here.
"""

from __future__ import annotations

import json
from importlib.metadata import Distribution, PackageNotFoundError, distribution, entry_points, version
from typing import Any, Literal

NAME = "quantkit-ptq"
PACKAGE = "quantkit"
UNKNOWN = "0+unknown"
"""The version of a checkout that runs without being installed."""
Extra = Literal["cluster", "cuda", "libraries", "llama-cpp", "mlflow", "sentencepiece", "signing", "tasks", "vision"]
STRANGERS = ("quantkit",)
"""Distributions of others that have a package ``quantkit`` and no such command, which is how the rest are found."""


def own_version() -> str:
    """The version of quantkit that is installed, else :data:`UNKNOWN`."""
    try:
        return version(NAME)
    except PackageNotFoundError:
        return UNKNOWN


def version_of(package: str) -> str:
    """The version of a package as records name it, where ``quantkit`` is ours.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    return own_version() if package == PACKAGE else version(package)


def requirement(extra: Extra) -> str:
    """What pip is given to install an extra, quoted for a shell."""
    return f"'{NAME}[{extra}]'"


def install_line(extra: Extra) -> str:
    """The command that adds an extra to this installation, wherever quantkit itself came from."""
    return f"pip install {requirement(extra)}"


def upgrade_line() -> str:
    """What brings a newer quantkit: from where the present one came."""
    origin = _origin(NAME)
    url = str(origin.get("url", ""))
    if "vcs_info" in origin:
        return f"pip install --upgrade '{NAME} @ {origin['vcs_info'].get('vcs', 'git')}+{url}'"
    if "dir_info" in origin:
        return f"upgrade the checkout in {url.removeprefix('file://')}, from which quantkit is installed"
    return f"pip install --upgrade {NAME}"


def in_the_way() -> list[str]:
    """Other distributions in this environment with a command or package of this name, such as PyPI's ``quantkit``.

    An editable one is a checkout of its owner's, and writes none of our files.
    """
    scripts = (each.dist for each in entry_points(group="console_scripts") if each.name == PACKAGE)
    named = (_distribution(name) for name in STRANGERS)
    names = {each.metadata["Name"] for each in (*scripts, *named) if each is not None}
    return sorted(name for name in names if name != NAME and not _origin(name).get("dir_info", {}).get("editable"))


def warnings() -> list[str]:
    """One line for each distribution that is in the way, with its remedy."""
    return [
        f"the distribution '{name}' in this environment is another program with a package or command '{PACKAGE}'"
        f" (pip uninstall {name} {NAME}, then install {NAME} again)"
        for name in in_the_way()
    ]


def _origin(name: str) -> dict[str, Any]:
    """``direct_url.json`` of a distribution; empty for one that came from an index or is not there."""
    found = _distribution(name)
    text = found.read_text("direct_url.json") if found is not None else None
    origin: dict[str, Any] = json.loads(text) if text else {}
    return origin


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None
