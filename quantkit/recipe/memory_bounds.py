"""The key ``max_memory``: what the stages may take of each device, and where activations may wait on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from quantkit.errors import RecipeError
from quantkit.system.memory_bounds import DISK, MemoryBounds
from quantkit.system.names import spelled_device
from quantkit.system.units import parse_bytes
from quantkit.system.validation import located

KEYS = "give cpu, cuda:N or its number, cuda for all GPUs, and disk with a folder"


def parse_bounds(given: Mapping[Any, Any]) -> MemoryBounds:
    """Bounds as a recipe writes them, ``{cuda:0: 20GiB, cpu: 60GiB, disk: ./scratch}``; a GPU may be its number.

    Raises:
        RecipeError: a key is no device, one is there twice, a size is none, or the disk is no folder.
    """
    devices: dict[str, int] = {}
    disk = None
    for key, value in given.items():
        name = spelled_device(f"cuda:{key}" if re.fullmatch(r"\d+", str(key)) else str(key))
        if name == DISK:
            disk = _folder(value)
            continue
        if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
            raise RecipeError(f"'{key}' is not a device", KEYS)
        if name in devices:
            raise RecipeError(f"{name} is there twice", "keep one of them")
        devices[name] = parse_bytes(value)
        if not devices[name]:
            raise RecipeError(f"{name} may have no memory at all", "give a size such as 8GiB, or leave it out")
    return MemoryBounds(devices, disk)


def _folder(value: Any) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"disk is {value!r}, which is no folder", "name a folder, such as ./scratch")
    return Path(value).expanduser()


def _parsed(given: object) -> object:
    if isinstance(given, MemoryBounds):
        return given
    with located():
        if not isinstance(given, Mapping):
            raise RecipeError(f"{given!r} is no mapping of devices to sizes", "write {cpu: 8GiB}")
        return parse_bounds(given)


MaxMemory = Annotated[MemoryBounds, BeforeValidator(_parsed), PlainSerializer(MemoryBounds.to_json)]
"""A mapping of devices to sizes; see :func:`parse_bounds`."""
