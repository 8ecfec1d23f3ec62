"""What the operating system refuses, in one line with a remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import OutputError, QuantkitError

ELSEWHERE = "name another output folder"
REMEDIES = {
    errno.ENOSPC: "free some disk space and run the same command again; what is finished is kept",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "the file system or a limit of this session (ulimit -f) allows no file of this size",
    errno.EIO: "the disk reports a fault: name an output folder on another one",
    errno.EROFS: f"the file system is read-only: {ELSEWHERE}",
    errno.EACCES: f"no permission: {ELSEWHERE} or change its permissions",
    errno.EPERM: f"no permission: {ELSEWHERE} or change its permissions",
    errno.EEXIST: f"a part of the path is a file: {ELSEWHERE}",
    errno.ENOTDIR: f"a part of the path is a file: {ELSEWHERE}",
    errno.ENAMETOOLONG: f"the path is too long: {ELSEWHERE}",
}
"""What the user can do about each refusal of the operating system to write."""
ANYWHERE = {
    errno.ENAMETOOLONG: "check the path",
    errno.ELOOP: "check the path: its links lead in a circle",
    errno.EACCES: "no permission: check who may read and write it",
    errno.EPERM: "no permission: check who may read and write it",
    errno.EMFILE: "too many files are open: raise the limit of this session (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.EIO: "the disk reports a fault: check the disk, and copy the file from its source",
    errno.ENOSPC: REMEDIES[errno.ENOSPC],
    errno.EDQUOT: REMEDIES[errno.EDQUOT],
}
"""What the user can do about each refusal that can meet any access to a file."""


@contextmanager
def translated_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise OutputError(f"cannot write {path}: {error.strerror}", REMEDIES[error.errno]) from error


def as_quantkit_error(error: OSError) -> QuantkitError | None:
    """A refusal of the operating system that no reader foresaw, in one line; None for what is more likely a bug."""
    if error.errno not in ANYWHERE or not isinstance(error.filename, str | bytes):
        return None
    return QuantkitError(f"cannot use {os.fsdecode(error.filename)}: {error.strerror}", ANYWHERE[error.errno])


def cpu_ran_out(error: BaseException) -> bool:
    """Whether the memory of the CPU ran out, which torch tells as any other failure of an operation."""
    is_torchs = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return is_torchs or isinstance(error, MemoryError)


def is_file(path: Path) -> bool:
    """Whether there is such a file, where the name is of a foreign document: one that no file can have is of none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def may_pass(error: BaseException) -> bool:
    """Whether the same command may do better, so that what was done so far is worth keeping.

    True of an interruption, of all that the operating system or the lack of memory is the reason of, and of what nobody
    expected; false of a mistake in what was asked for or in the numbers.
    """
    if not isinstance(error, QuantkitError):
        return True
    cause = error.__cause__
    # torch's error for a full GPU is told by its name, so that nothing here imports torch.
    return isinstance(cause, OSError | MemoryError) or type(cause).__name__ == "OutOfMemoryError"
