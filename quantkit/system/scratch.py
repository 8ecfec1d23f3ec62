"""Folders for what is needed meanwhile: beside an output that a command works at, and on a disk that a user names."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from quantkit.system.artifacts import clear_up
from quantkit.system.locks import held
from quantkit.system.os_errors import may_pass, translated_os_errors


@contextmanager
def workplace(out: Path, work: str) -> Iterator[Path]:
    """``.NAME.work`` beside an output that nobody else may write meanwhile.

    It is gone when the block ends, and stays for the next command where work was interrupted or the disk was full.

    Args:
        out: the output.
        work: what is being done, for whoever comes meanwhile.

    Raises:
        OutputError: another process writes ``out``, or no folder can be made beside it.
    """
    with held(out, work):
        folder = out.absolute().parent / f".{out.name}.work"
        with translated_os_errors(out):
            clear_up(out)
            folder.mkdir(exist_ok=True)
        try:
            yield folder
        except BaseException as error:
            if not may_pass(error) or not any(folder.iterdir()):
                _remove(folder, out)
            raise
        _remove(folder, out)


@contextmanager
def folder_in(place: Path | None, prefix: str) -> Iterator[Path]:
    """A folder of its own that is gone when the block ends.

    Args:
        place: in which it lies, which need not exist; None is where temporary files go.
        prefix: of its name.

    Raises:
        OutputError: it cannot be made.
    """
    with ExitStack() as ends:
        with translated_os_errors(place or Path(tempfile.gettempdir())):
            if place is not None:
                place.mkdir(parents=True, exist_ok=True)
            made = ends.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=place))
        yield Path(made)


def _remove(folder: Path, out: Path) -> None:
    """Remove a folder so that no half of it stays under its name, whenever the process is killed."""
    doomed = out.absolute().with_name(f".{out.name}.partial-work")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
