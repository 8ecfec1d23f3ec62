"""Processes below another: how much memory they hold, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path

import psutil

MARK = "QUANTKIT_WORKER"
"""Environment variable by which even a process that left the group of its worker is found."""
GRACE = 5.0
"""Seconds between asking processes to end and killing them."""


def resident_bytes(pid: int, at_most: int) -> int:
    """Resident bytes of a process and all below it.

    Pages that processes share count once. To tell that is slow, so it is done where a sum over ``at_most`` asks for it.
    """
    family = _family(pid)
    total = sum(_resident(each) for each in family)
    if total > at_most and len(family) > 1:
        return sum(_proportional(each) for each in family)
    return total


def has_ended(pid: int) -> bool:
    """Whether a child has ended; it is not waited for, so that its number stays its own."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def end_all(pid: int, mark: str, *, patient: bool) -> None:
    """End a child, its process group, and every process that bears its mark.

    Args:
        pid: of the child, which leads its group.
        mark: value of :data:`MARK` in its environment.
        patient: leave them :data:`GRACE` for ending by themselves.
    """
    strays = {*_family(pid), *_marked(mark)}
    if patient and strays:
        outside = [each for each in strays if not _in_group(each, pid)]  # a second signal would cut a good-bye short
        _end_group(pid, by_force=False)
        _end_each(outside, by_force=False)
        psutil.wait_procs(strays, timeout=GRACE)
    _end_group(pid, by_force=True)
    deadline = time.monotonic() + GRACE
    while (left := _marked(mark)) and time.monotonic() < deadline:
        _end_each(left, by_force=True)
        psutil.wait_procs(left, timeout=0.2)


def killed_for_memory() -> int:
    """How many processes the kernel has killed for want of memory since it started; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def signal_name(number: int) -> str:
    """Such as ``SIGKILL``."""
    return {member.value: member.name for member in signal.Signals}.get(number, f"number {number}")


def _family(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _marked(mark: str) -> list[psutil.Process]:
    """The living processes whose environment has the mark; those of other users cannot be asked."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _end_group(pid: int, *, by_force: bool) -> None:
    if os.name != "posix":  # there are no groups: children are ended one by one
        _end_each(_family(pid), by_force=by_force)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS forbids it for a group of zombies
        os.killpg(pid, signal.SIGKILL if by_force else signal.SIGTERM)


def _in_group(process: psutil.Process, pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return os.name != "posix" or os.getpgid(process.pid) == pid
    return False


def _end_each(processes: Collection[psutil.Process], *, by_force: bool) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill() if by_force else process.terminate()


def _resident(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def _proportional(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        found = process.memory_full_info()
        return int(getattr(found, "pss", found.rss))
    return 0
