"""A GGUF file, written while holding no more than one tensor.

The layout is that which :mod:`quantkit.gguf.head` reads, version 3, little-endian. The package gguf has a writer too,
which cannot write the empty list of merges that a tokenizer of single bytes has. Without torch, as libraries write
files in environments that may not have it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from numpy.typing import NDArray

from quantkit.gguf.head import ALIGNMENT, ARRAY, BOOL, FLOAT32, INT32, MAGIC, STRING, UINT32
from quantkit.system.os_errors import translated_os_errors

VERSION = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor on its way into a file.

    Attributes:
        name: in the file.
        kind: number of its GGML type.
        shape: in torch's order; of a packed tensor that of its weights.
        nbytes: that it takes.
        read: gives it, of any dtype and shape, with that many bytes.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Raw:
    """A metadata value as it lies in another file: the number of its type, and its bytes."""

    data: bytes


def write_file(path: Path, metadata: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """Write a GGUF file, its tensors one at a time.

    Args:
        path: the file, which is replaced.
        metadata: keys and values: text, bool, int (uint32), float (float32), lists of text, int (int32) or float, or
            what another file holds.
        entries: the tensors in their order in the file.

    Raises:
        OutputError: the disk is full, the folder read-only.
        ValueError: a tensor does not have the bytes that were announced.
    """
    with translated_os_errors(path), path.open("wb") as file:
        file.write(_head(metadata, entries))
        for entry in entries:
            _pad(file)
            _write_tensor(file, entry)
        _pad(file)
        file.flush()
        os.fsync(file.fileno())


def file_bytes(metadata: Mapping[str, Any], entries: Sequence[Entry]) -> int:
    """Bytes of the file that :func:`write_file` would write, told without reading a tensor."""
    return sum(_aligned(size) for size in (len(_head(metadata, entries)), *(entry.nbytes for entry in entries)))


def _head(metadata: Mapping[str, Any], entries: Sequence[Entry]) -> bytes:
    """All before the tensors."""
    pairs = b"".join(_string(key) + _value(value) for key, value in metadata.items())
    return MAGIC + struct.pack("<IQQ", VERSION, len(entries), len(metadata)) + pairs + _table(entries)


def _aligned(nbytes: int) -> int:
    """Bytes with the padding that follows them."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _table(entries: Iterable[Entry]) -> bytes:
    """Name, shape, type and offset of each tensor."""
    rows, offset = [], 0
    for entry in entries:
        shape = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
        rows.append(_string(entry.name) + shape + struct.pack("<IQ", entry.kind, offset))
        offset += _aligned(entry.nbytes)
    return b"".join(rows)


def _write_tensor(file: BinaryIO, entry: Entry) -> None:
    data = numpy.ascontiguousarray(entry.read()).reshape(-1).view(numpy.uint8).data
    if len(data) != entry.nbytes:
        raise ValueError(f"tensor '{entry.name}' has {len(data)} bytes where {entry.nbytes} were announced")
    file.write(data)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    match value:
        case Raw():
            return value.data
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + _string(value)
        case list():
            return struct.pack("<I", ARRAY) + _array(value)
    raise TypeError(f"a GGUF file has no type for {type(value).__name__}")


def _array(items: list[Any]) -> bytes:
    """A list, whose first item tells the type; an empty one is of texts."""
    match items[:1]:
        case [int()]:
            return struct.pack(f"<IQ{len(items)}i", INT32, len(items), *items)
        case [float()]:
            return struct.pack(f"<IQ{len(items)}f", FLOAT32, len(items), *items)
    return struct.pack("<IQ", STRING, len(items)) + b"".join(map(_string, items))
