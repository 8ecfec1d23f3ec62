"""What a user lets a process take of each device, and where what does not fit may wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DISK = "disk"


@dataclass(frozen=True, slots=True)
class MemoryBounds:
    """Bounds of memory; see :mod:`quantkit.recipe.memory_bounds` for how they are written.

    Attributes:
        devices: bytes by ``cpu``, ``cuda:N``, or ``cuda`` for every GPU that is not named.
        disk: a folder in which activations may wait; None for none.
    """

    devices: Mapping[str, int] = field(default_factory=dict)
    disk: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.devices) or self.disk is not None

    def of(self, device: torch.device) -> int | None:
        """Bytes that a process may have of a device; None for no bound."""
        named = "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
        return self.devices.get(named, self.devices.get(device.type))

    def to_json(self) -> dict[str, Any]:
        """As a recipe has them."""
        return {**self.devices, **({} if self.disk is None else {DISK: str(self.disk)})}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MemoryBounds:
        """The inverse of :meth:`to_json`."""
        devices = {name: size for name, size in data.items() if name != DISK}
        return cls(devices, Path(data[DISK]) if DISK in data else None)


NO_BOUNDS = MemoryBounds()
