"""What a model takes: on disk, resident, and at its peak."""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of all safetensors files directly in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def resident_bytes(model: PreTrainedModel) -> int:
    """Bytes of the storages behind all parameters and buffers; what is shared counts once."""
    storages = {
        (tensor.device, tensor.untyped_storage().data_ptr()): tensor.untyped_storage().nbytes()
        for tensor in itertools.chain(model.parameters(), model.buffers())
        if tensor.device.type != "meta"
    }
    return sum(storages.values())


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

    def loaded(self, model: PreTrainedModel) -> None:
        """Note the weights as they were loaded, before any forward pass."""
        self._loaded = resident_bytes(model)

    def figures(self, model: PreTrainedModel) -> dict[str, Any]:
        """All figures, after the model has run.

        Returns:
            ``weights_bytes`` as loaded, ``weights_bytes_running`` now, ``peak_bytes`` since the process began
            (CPU) or since this watch did (CUDA), ``peak_kind``, ``baseline_bytes`` before loading, ``device``,
            and on CUDA ``process_bytes`` (None where it cannot be told).
        """
        figures: dict[str, Any] = {
            "weights_bytes": self._loaded,
            "weights_bytes_running": resident_bytes(model),
            "peak_bytes": _peak_bytes(self._device),
            "peak_kind": "CUDA allocator" if self._device.type == "cuda" else "RSS",
            "baseline_bytes": self._baseline,
            "device": device_name(self._device),
        }
        if self._device.type == "cuda":
            figures["process_bytes"] = _nvml_process_bytes(self._device)
        return figures


def device_name(device: torch.device) -> str:
    """``cpu``, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
