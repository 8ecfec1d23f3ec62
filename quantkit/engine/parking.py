"""Where the activations of passes wait that stand before a segment: in the memory of the CPU, and then on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import ref

import torch

from quantkit.engine.kept_calls import Fetch, OnDisk
from quantkit.engine.passes import CPU, AtSegment, Pass
from quantkit.errors import OutputError
from quantkit.system.artifacts import translated_os_errors

SMALL = 1 << 16
"""Bytes of a tensor that is not worth a file."""


@dataclass(slots=True)
class Parking:
    """Takes what passes hold that stand before a segment, and gives it back.

    The tensors stay the same objects, so that the model's code finds them again. What a pass was given before an
    earlier segment and still holds, as models hold the embeddings, goes along. It is closed when the passes have ended.

    Args:
        memory: bytes that may wait in the memory of the CPU; None for all.
        disk: a folder in which the rest waits, in a folder of its own; without, all waits in memory.
    """

    memory: int | None = None
    disk: Path | None = None
    _inside: dict[int, int] = field(default_factory=dict)
    _away: dict[int, Fetch] = field(default_factory=dict)
    _folder: Path | None = None
    _keep: OnDisk | None = None

    def park(self, each: Pass) -> None:
        """Move what a pass holds out of the way; nothing where it stands elsewhere than before a segment.

        Raises:
            OutputError: the disk is full.
        """
        if not isinstance(each.place, AtSegment):
            return
        held = {id(tensor): tensor for tensor in (*_alive(each), *_tensors([each.place.args, each.place.kwargs]))}
        each.parked = [ref(tensor) for tensor in held.values()]
        for tensor in held.values():
            if id(tensor) not in self._away:
                self._park(tensor)

    def fetch(self, each: Pass, device: torch.device) -> None:
        """Bring it to the device of the walk.

        Raises:
            OutputError: a file is gone, or cut off.
        """
        for tensor in _alive(each):
            self._inside.pop(id(tensor), None)
            away = self._away.pop(id(tensor), None)
            if away is not None:
                tensor.data = away().to(device)
            elif tensor.device != device:
                tensor.data = tensor.data.to(device)

    def close(self) -> None:
        """Remove what is left on disk."""
        self._away.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = self._keep = None

    def _park(self, tensor: torch.Tensor) -> None:
        if self._stays(tensor):
            self._inside[id(tensor)] = tensor.nbytes
            if tensor.device != CPU:
                tensor.data = tensor.data.to(CPU)
            return
        self._away[id(tensor)] = self._disk()(tensor)
        tensor.data = tensor.data.new_empty(0)

    def _stays(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor waits in memory: there is room, or it is a part of another, or too small for a file."""
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        if self.disk is None or self.memory is None or not whole or tensor.nbytes < SMALL:
            return True
        return sum(self._inside.values()) + tensor.nbytes <= self.memory

    def _disk(self) -> OnDisk:
        if self._keep is None:
            if self.disk is None:
                raise OutputError("activations have no folder to wait in", "name one as max_memory.disk")
            with translated_os_errors(self.disk):
                self.disk.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="activations-", dir=self.disk))
            self._keep = OnDisk(self._folder)
        return self._keep


def _alive(each: Pass) -> list[torch.Tensor]:
    """What a pass has left elsewhere and still holds."""
    return [tensor for tensor in (known() for known in each.parked) if tensor is not None]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
