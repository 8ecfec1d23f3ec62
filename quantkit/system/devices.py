"""Devices: from the name in a recipe to the device that is there."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch

from quantkit.errors import QuantkitError
from quantkit.system.names import spelled_device

USE = "use auto, cpu, cuda or cuda:N"


def resolve_device(name: str) -> torch.device:
    """The device that a recipe or a command names; ``auto`` is CUDA where there is one.

    Raises:
        QuantkitError: it is not there, or neither a CPU nor a CUDA device.
    """
    name = spelled_device(name)
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise QuantkitError(f"'{name}' is not a device", USE) from error
    if device.type not in ("cpu", "cuda"):
        raise QuantkitError(f"quantkit computes on cpu and cuda, not on '{name}'", USE)
    visible = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= visible:
        raise QuantkitError(
            f"device {name} is not available: torch sees {visible} CUDA device{'' if visible == 1 else 's'}",
            "use auto or cpu",
        )
    return device if device.type == "cpu" else torch.device("cuda", device.index or 0)


Devices = Literal["all"] | int | tuple[str, ...] | None
"""Over which devices work is dealt: all GPUs, so many, or these; None is over none but one's own."""


def resolve_devices(name: str, devices: Devices) -> list[torch.device]:
    """The devices of a walk, the first that of its own process.

    So many are the first GPUs, or on a CPU so many processes.

    Args:
        name: of the one device, where ``devices`` does not say them.
        devices: those over which work is dealt.

    Raises:
        QuantkitError: one is not there.
    """
    first = resolve_device(name)
    if devices is None:
        return [first]
    if isinstance(devices, tuple):
        return [resolve_device(each) for each in devices]
    if first.type == "cpu":
        return [first] * (1 if devices == "all" else devices)
    count = torch.cuda.device_count() if devices == "all" else devices
    return [resolve_device(f"cuda:{index}") for index in range(count)]


def device_name(device: torch.device) -> str:
    """``cpu``, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass(frozen=True, slots=True)
class Moment:
    """When a device has done what it was asked until then; a GPU is not waited for before a difference is asked for.

    Attributes:
        clock: of the host, by :func:`time.perf_counter`.
        event: on a GPU.
    """

    clock: float
    event: torch.cuda.Event | None = None

    @classmethod
    def now(cls, device: torch.device) -> Moment:
        """That of the call, on a device."""
        if device.type != "cuda":
            return cls(perf_counter())
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch gives it no types
        event.record(torch.cuda.current_stream(device))
        return cls(perf_counter(), event)

    def seconds_until(self, later: Moment) -> float:
        """Seconds to a later moment on the same device, which is waited for."""
        if self.event is None or later.event is None:
            return later.clock - self.clock
        later.event.synchronize()
        return float(self.event.elapsed_time(later.event)) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait until all that was asked of a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
