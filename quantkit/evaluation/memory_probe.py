"""What a process holds, on the CPU or on a CUDA device: now, and at most since its peak began anew."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
RESETS_PEAK = "5"
"""What Linux takes, written to :data:`CLEAR_REFS`, as the wish to begin ``VmHWM`` anew (``man 5 proc``)."""


class Probe(Protocol):
    """Reads the memory of this process on one device.

    Attributes:
        kind: what the peak is of.
    """

    kind: str

    def begin(self) -> bool:
        """Begin the peak anew, after all work that was asked of the device; whether that was possible."""

    def read(self) -> dict[str, Any]:
        """``used_bytes`` and ``peak_bytes``, after all work is done; on CUDA further figures."""


class HostProbe:
    """The resident set of this process, with Python, torch and mapped files in it."""

    kind = "RSS"

    def begin(self) -> bool:
        """Give back what the C library keeps, then forget the peak.

        Linux alone can forget it, and not everywhere: in some containers ``/proc`` may not be written to.
        """
        gc.collect()
        give_back()
        try:
            CLEAR_REFS.write_text(RESETS_PEAK, encoding="ascii")
        except OSError:
            return False
        return True

    def read(self) -> dict[str, Any]:
        """Resident set, now and at most."""
        used, peak = int(psutil.Process().memory_info().rss), peak_rss()
        return {"used_bytes": used, "peak_bytes": max(used, peak)}


class CudaProbe:
    """What torch's allocator gave out, and what the process holds on the device.

    The allocator keeps freed memory for itself, so the process's figure after some work is also its peak during it, if
    what was kept is given back before.

    Args:
        device: a CUDA device.
    """

    kind = "CUDA allocator"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self) -> bool:
        """Give back what the allocator keeps, and begin its peaks anew."""
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return True

    def read(self) -> dict[str, Any]:
        """Also ``reserved_bytes``, what the allocator held at most, and ``process_bytes``, None where unknown.

        The difference of the two is what the device's runtime takes for itself: context, kernels, workspaces.
        """
        torch.cuda.synchronize(self._device)
        return {
            "used_bytes": torch.cuda.memory_allocated(self._device),
            "peak_bytes": torch.cuda.max_memory_allocated(self._device),
            "reserved_bytes": torch.cuda.max_memory_reserved(self._device),
            "process_bytes": process_bytes(self._device),
        }


def probe_of(device: torch.device) -> Probe:
    """The probe of a device."""
    return CudaProbe(device) if device.type == "cuda" else HostProbe()


def give_back() -> None:
    """Have glibc return freed memory to the system, of which it keeps pieces of up to 32 MiB; others do as they do."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def peak_rss() -> int:
    """The largest resident set that this process has had, in bytes.

    On Linux from ``VmHWM``, which begins with the program or where :meth:`HostProbe.begin` began it anew;
    ``ru_maxrss`` would begin with the size of the process that started it (``execve`` keeps it).
    """
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_bytes(device: torch.device) -> int | None:
    """What NVML says that this process holds on a CUDA device; None without ``nvidia-ml-py`` or its answer.

    In a container the driver may list processes by numbers that mean nothing there, and some drivers, such as those
    of Windows, do not tell how much a process holds.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    found = next((process.usedGpuMemory for process in running if process.pid == os.getpid()), None)
    return None if found is None else int(found)
