"""One writer an output: a lock file beside it, which the operating system releases when its holder ends.

The lock is ``flock`` on a file called ``.NAME.lock`` beside the output, so it is gone with the process that holds it,
however that ends. The file says who holds it. It is removed while the lock is still held: who opened it before and gets
the lock afterwards finds that it has no name any more, and starts over with the file of that name.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantkit.errors import OutputError
from quantkit.system.os_errors import translated_os_errors

PATIENCE = 0.5
"""Seconds to wait for a lock: enough for one that is being given back, too short to be felt."""
_mine = threading.local()


@contextmanager
def held(path: Path, work: str, *, inside: bool = False) -> Iterator[None]:
    """Hold the only right to write an output while the block runs.

    Args:
        path: the output, which need not exist; its parent folder is made.
        work: what is being done, for whoever comes meanwhile.
        inside: ``path`` is a folder that fills up, and the lock file lies in it; its parent need not be writable.

    Raises:
        OutputError: another process or thread holds it, or the file system has no place for a lock file or knows no
            locks.
        RuntimeError: this thread holds it already, which is an error of the program.
    """
    from filelock import FileLock, Timeout

    file = lock_file(path / "run") if inside else lock_file(path)
    if file in _held():
        raise RuntimeError(f"{path} is already locked by this thread")
    lock = FileLock(file, timeout=PATIENCE, poll_interval=0.02, fallback_to_soft=False, mode=0o644)
    with translated_os_errors(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise OutputError(f"{path} is being written by {_holder(file)}", _WAIT) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP):
                raise
            raise OutputError(f"the file system of {path} knows no locks", "name an output folder elsewhere") from error
    try:
        with translated_os_errors(path):
            file.write_text(json.dumps(_who(work)), encoding="utf-8")
            _held()[file] = file.stat().st_ino
        yield
    finally:
        if _inode(file) == _held().pop(file, None):
            file.unlink(missing_ok=True)  # and not that of one who took the output over
        lock.release()


def alone(path: Path, work: str) -> AbstractContextManager[None]:
    """:func:`held`, where this thread does not hold the lock already."""
    return nullcontext() if holds(path) else held(path, work)


def holds(path: Path) -> bool:
    """Whether this thread holds the lock of an output."""
    return lock_file(path) in _held()


def lock_file(path: Path) -> Path:
    """The lock file of an output, through whatever links its folder is reached."""
    place = path.absolute()
    return Path(os.path.realpath(place.parent)) / f".{place.name}.lock"


_WAIT = "wait until it is done, stop that process, or name another output folder"


def check_held(path: Path, *, inside: bool = False) -> None:
    """Refuse to go on with an output whose lock this thread held and holds no longer.

    Raises:
        OutputError: its folder is gone, as where what was mounted there is; or another process took it over, for which
            this one counts as dead, see :func:`break_lock`.
    """
    file = lock_file(path / "run") if inside else lock_file(path)
    if file not in _held() or _inode(file) == _held()[file]:
        return
    if not file.exists():
        raise OutputError(
            f"the lock of {path} is gone on {socket.gethostname()}, and maybe the folder with it",
            "see that a shared folder is mounted; the same command goes on from what is saved",
        )
    raise OutputError(f"{path} was taken over by {_holder(file)}", "leave it to that process")


def break_lock(path: Path) -> None:
    """Take the lock of an output from a process that counts as dead; if it lives, it ends before it writes again.

    For who alone says who writes the output, as the starter of both does.
    """
    lock_file(path).unlink(missing_ok=True)


def _inode(file: Path) -> int | None:
    try:
        return file.stat().st_ino
    except OSError:
        return None


def _held() -> dict[Path, int]:
    """The lock files that this thread holds, and which file of that name each was."""
    if not hasattr(_mine, "files"):
        _mine.files = dict[Path, int]()
    files: dict[Path, int] = _mine.files
    return files


def _who(work: str) -> dict[str, Any]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "work": work}


def _holder(file: Path) -> str:
    """Who holds a lock, as its file says."""
    try:
        who = json.loads(file.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']} since {who['since']} ({who['work']})"
    except (OSError, ValueError, KeyError, TypeError):  # taken or given back this very moment
        return "another process"
