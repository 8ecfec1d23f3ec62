"""The matrix as it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantkit.system.artifacts import read_json

MATRIX_FILE = Path(__file__).with_name("matrix.json")
WORKS, FAILS, UNTRIED = "works", "fails", "untried"
"""What a cell says: it was done and compared; it was done and went wrong; nobody did it."""


def read_matrix() -> dict[str, Any]:
    """The matrix.

    Returns:
        ``rows``, each with ``format``, ``name``, ``keys`` of a variant, ``methods`` (name to state) and ``runtimes``
        (name to ``state``, ``reason`` and ``kl``), and ``versions`` of what they were done with.
    """
    found: dict[str, Any] = read_json(MATRIX_FILE)
    return found
