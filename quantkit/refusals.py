"""What the operating system refuses, in one line with a remedy."""

from __future__ import annotations

import errno
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


@contextmanager
def translated_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise OutputError(f"cannot write {path}: {error.strerror}", REMEDIES[error.errno]) from error


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
