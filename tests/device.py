"""A CUDA device that is played: torch's allocator and NVML with the figures of a process that takes what it is told."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, ClassVar

import torch


class NVMLError(Exception):
    """As in ``pynvml``."""


class FakeCuda:
    """What torch.cuda and NVML would tell.

    Args:
        context: bytes of the context; None is a driver that does not tell what a process holds.

    Attributes:
        calls: what was asked and done, in order.
        asked: the devices of which NVML was asked.
        nvml: stands for the module ``pynvml``.
        pid: of the process that NVML lists.
        fails: NVML answers with an error.
    """

    ANSWERS: ClassVar[tuple[str, ...]] = (
        *("synchronize", "empty_cache", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"),
        *("max_memory_reserved", "get_device_properties", "get_device_name"),
    )

    def __init__(self, context: int | None) -> None:
        self.device = torch.device("cuda", 0)
        self.context, self.pid, self.fails = context, os.getpid(), False
        self.calls: list[str] = []
        self.asked: list[str] = []
        self._kept = self._peak = 0
        self.nvml = SimpleNamespace(
            NVMLError=NVMLError,
            nvmlInit=lambda: None,
            nvmlDeviceGetHandleByUUID=self._handle,
            nvmlDeviceGetComputeRunningProcesses=self._processes,
        )

    def take(self, nbytes: int) -> None:
        """Take memory and free it; the allocator keeps it."""
        self.calls.append("take")
        self._peak, self._kept = max(self._peak, nbytes), max(self._kept, nbytes)

    def synchronize(self, device: torch.device) -> None:
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
        self._kept = 0

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.calls.append("reset_peak_memory_stats")
        self._peak = 0

    def memory_allocated(self, device: torch.device) -> int:
        self.calls.append("memory_allocated")
        return 0

    def max_memory_allocated(self, device: torch.device) -> int:
        self.calls.append("max_memory_allocated")
        return self._peak

    def max_memory_reserved(self, device: torch.device) -> int:
        self.calls.append("max_memory_reserved")
        return self._kept

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(uuid="1234")

    def get_device_name(self, device: torch.device) -> str:
        return "a card"

    def _handle(self, uuid: str) -> str:
        if self.fails:
            raise NVMLError("not found")
        self.asked.append(uuid)
        return uuid

    def _processes(self, handle: str) -> list[Any]:
        used = None if self.context is None else self.context + self._kept
        return [SimpleNamespace(pid=1, usedGpuMemory=7), SimpleNamespace(pid=self.pid, usedGpuMemory=used)]
