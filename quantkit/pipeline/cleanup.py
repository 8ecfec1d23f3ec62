"""Cleaning up what killed runs left in the folder of a run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from quantkit.errors import OutputError
from quantkit.system.artifacts import clear_up
from quantkit.system.locks import held

LEFT = re.compile(r"\.(?P<name>.+?)\.(?P<kind>lock|layers|training|spool|partial-.*|old-.*)")
"""Lock files, solved layers of unfinished variants (``spool`` in earlier versions), states of their training, and what
was half written or put aside."""
UNFINISHED = ("layers", "training")
"""Kinds that variants go on from."""
SCRATCH = ".adapters-"
OWN_LOCK = ".run.lock"


def clear_leftovers(folder: Path, variants: Collection[Path]) -> None:
    """Remove what killed runs left in the folder of a run, but for what its variants go on from.

    The lock of the run is held; what another process is at is left to it.

    Args:
        folder: of the run.
        variants: the folders of its variants.
    """
    for path in sorted(folder.rglob(".*")):
        found = LEFT.fullmatch(path.name)
        if path.name.startswith(SCRATCH):
            shutil.rmtree(path, ignore_errors=True)
        if found is None or path.name == OWN_LOCK or not path.exists():
            continue
        output = path.with_name(found["name"])
        if found["kind"] in UNFINISHED and output in variants:
            continue
        with suppress(OutputError), held(output, "clearing up"):
            clear_up(output)
            if found["kind"] in (*UNFINISHED, "spool"):
                shutil.rmtree(path, ignore_errors=True)
