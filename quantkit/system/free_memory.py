"""Memory that this process may still take: what the device has free, and on the CPU no more than its limits leave."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from quantkit.system.memory_bounds import NO_BOUNDS, MemoryBounds
from quantkit.system.threads import control_groups

UNLIMITED = 1 << 60
"""What version 1 of control groups says of a group without a limit is larger than this."""
GIVEN_BACK = ("total_inactive_file", "total_active_file", "inactive_file", "active_file")
"""What of a control group's use is the cache of files, which it gives back; version 1 first, of all below a group."""


def free_bytes(device: torch.device, bounds: MemoryBounds = NO_BOUNDS) -> int:
    """Bytes that this process can still take on a device.

    On the CPU the least of what the machine has, what control groups leave (a container's ``memory.max``), what
    ``ulimit -v`` and ``ulimit -d`` do, and what the process has not taken yet of the user's bound.

    Args:
        device: of torch.
        bounds: the user's.
    """
    bound = bounds.of(device)
    if device.type == "cuda":
        left = [] if bound is None else [bound - torch.cuda.memory_allocated(device)]
        return max(0, min([torch.cuda.mem_get_info(device)[0], *left]))
    left = [] if bound is None else [bound - psutil.Process().memory_info().rss]
    return max(0, min([psutil.virtual_memory().available, *_left_by_limits(), *left_by_groups(), *left]))


@contextmanager
def kept_to(device: torch.device, bounds: MemoryBounds) -> Iterator[None]:
    """Inside the block, torch takes no more of a GPU than its bound: what asks for more is told that it is full."""
    bound = bounds.of(device)
    if bound is None or device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, bound / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def give_back() -> None:
    """Have glibc return freed memory to the system, of which it keeps pieces of up to 32 MiB; others do as they do."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def left_by_groups(root: Path = Path("/")) -> Iterator[int]:
    """What each control group of this process with a limit of memory still leaves.

    Args:
        root: the folder that has ``proc`` and ``sys``.
    """
    for group in control_groups("memory", root):
        try:
            is_second = (group / "memory.max").is_file()
            limit = _number(group / ("memory.max" if is_second else "memory.limit_in_bytes"))
            used = _number(group / ("memory.current" if is_second else "memory.usage_in_bytes"))
            told = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        except OSError:
            continue
        names = GIVEN_BACK[:2] if GIVEN_BACK[0] in told else GIVEN_BACK[2:]
        if limit is not None and used is not None and limit < UNLIMITED:
            yield limit - used + sum(int(told.get(name, 0)) for name in names)


def _number(file: Path) -> int | None:
    text = file.read_text(encoding="utf-8").strip()
    return int(text) if text.isdecimal() else None


def _left_by_limits() -> Iterator[int]:
    """What ``ulimit`` leaves: of addresses, and of memory that is no file's."""
    if sys.platform == "win32":
        return
    import resource

    found = psutil.Process().memory_info()
    for limit, used in (("RLIMIT_AS", found.vms), ("RLIMIT_DATA", getattr(found, "data", 0))):
        soft = resource.getrlimit(getattr(resource, limit))[0] if hasattr(resource, limit) else resource.RLIM_INFINITY
        if soft != resource.RLIM_INFINITY:
            yield soft - used
