"""What a model takes: on disk, resident, and at its peak."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from quantkit.devices import device_name
from quantkit.exports import IMATRIX
from quantkit.runtimes.base import LoadedModel

WEIGHTS = ("*.safetensors", "*.gguf")
"""The files that hold weights."""


def checkpoint_bytes(path: Path) -> int:
    """Bytes of a file, or of all files with weights directly in a folder."""
    if path.is_file():
        return path.stat().st_size
    files = (file for pattern in WEIGHTS for file in path.glob(pattern) if file.name != IMATRIX)
    return sum(file.stat().st_size for file in files)


class MemoryWatch:
    """Watches one process's memory from before the model is loaded to after it has run.

    On a CPU the peak is the process's resident set, with Python, torch and mapped files in it. On CUDA it is
    what torch's allocator gave out, and beside it, where ``nvidia-ml-py`` is installed and the driver tells,
    what the whole process holds on the device.

    Args:
        device: where the model will run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self._baseline = _used_bytes(device)
        self._loaded = 0

    def loaded(self, model: LoadedModel) -> None:
        """Note the weights as they were loaded, before any forward pass."""
        self._loaded = model.weights_bytes()

    def figures(self, model: LoadedModel) -> dict[str, Any]:
        """All figures, after the model has run.

        Returns:
            ``weights_bytes`` as loaded, ``weights_bytes_running`` now, ``peak_bytes`` since the process began
            (CPU) or since this watch did (CUDA), ``peak_kind``, ``baseline_bytes`` before loading, ``device``,
            and on CUDA ``process_bytes`` (None where it cannot be told).
        """
        figures: dict[str, Any] = {
            "weights_bytes": self._loaded,
            "weights_bytes_running": model.weights_bytes(),
            "peak_bytes": _peak_bytes(self._device),
            "peak_kind": "CUDA allocator" if self._device.type == "cuda" else "RSS",
            "baseline_bytes": self._baseline,
            "device": device_name(self._device),
        }
        if self._device.type == "cuda":
            figures["process_bytes"] = _nvml_process_bytes(self._device)
        return figures


def _used_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return peak_rss()


def peak_rss() -> int:
    """The largest resident set that this process has had, in bytes.

    On Linux from ``VmHWM``, which begins with the program; ``ru_maxrss`` would begin with the size of the
    process that started it (``execve`` keeps it).
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


def _nvml_process_bytes(device: torch.device) -> int | None:
    """What NVML says that this process holds on the device; None without ``nvidia-ml-py`` or its answer.

    In a container the driver may list processes by numbers that mean nothing there.
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
    used = [process.usedGpuMemory for process in running if process.pid == os.getpid()]
    return used[0] if used else None
