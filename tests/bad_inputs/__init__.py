"""A corpus of inputs that are broken, hostile or absurd, each made by a small function, with the command that meets it.

A case is a function that takes a :class:`~tests.bad_inputs.place.Place`, makes files there, and returns the arguments
of ``quantkit``. The text given to its decorator must stand in the one line that the command answers with.
"""

from __future__ import annotations

from importlib import import_module

from tests.bad_inputs.case import CASES, Case

GROUPS = (
    "configs",
    "indexes",
    "headers",
    "ggufs",
    "tokenizers",
    "recipes",
    "adapters",
    "archives",
    "templates",
    "record_files",
    "manifests",
    "pickles",
    "remote_code",
    "reports",
)

__all__ = ["CASES", "GROUPS", "Case"]

for _group in GROUPS:
    import_module(f"tests.bad_inputs.{_group}")
