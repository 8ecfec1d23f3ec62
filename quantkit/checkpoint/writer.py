"""Writing a checkpoint one tensor at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import BinaryIO

import torch

from quantkit.checkpoint.header import DTYPE_NAMES, INDEX_FILE, SINGLE_FILE
from quantkit.system.artifacts import json_text, translated_os_errors, write_json


@dataclass(frozen=True, slots=True)
class _Declared:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(slots=True)
class _Shard:
    tensors: list[_Declared] = field(default_factory=list)
    nbytes: int = 0

    def layout(self, said: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
        """The bytes before the data, and where in the file each tensor begins.

        Wide dtypes lie first, as safetensors itself writes them, so that every tensor is aligned.

        Args:
            said: of the file, in its header.
        """
        header: dict[str, object] = {"__metadata__": {"format": "pt", **said}}
        offset, offsets = 0, {}
        for tensor in sorted(self.tensors, key=lambda tensor: -tensor.dtype.itemsize):
            offsets[tensor.name] = offset
            header[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        return head, {name: len(head) + offset for name, offset in offsets.items()}


class ShardWriter:
    """Writes ``model.safetensors``, or an index and shards, while holding no tensor.

    Declare every tensor, then write each in the order of the declarations; as a context manager it closes
    itself when the block ends well::

        with ShardWriter(folder) as writer:
            writer.declare("weight", torch.float32, (2, 3))
            writer.write("weight", torch.zeros(2, 3))

    Args:
        folder: made if it is not there.
        max_shard_bytes: bytes of tensors a shard may hold; a larger tensor gets a shard of its own.
        said: what the header of each file says beside ``format``, see :func:`quantkit.checkpoint.header.read_said`.
    """

    def __init__(
        self, folder: Path, max_shard_bytes: int = 4 << 30, said: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self._said = said
        self._shards: list[_Shard] = [_Shard()]
        self._names: set[str] = set()
        self._plan: list[tuple[int, _Declared]] | None = None
        self._done = 0
        self._open: tuple[int, BinaryIO, dict[str, int]] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if self._open is not None:
                with translated_os_errors(self.folder):  # what could not be written is refused again here
                    self._open[1].close()

    def declare(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Announce the next tensor.

        Raises:
            ValueError: the name was declared already, writing has begun, or safetensors has no such dtype.
        """
        if self._plan is not None:
            raise ValueError(f"tensor '{name}' is declared after the first was written")
        if name in self._names or name == "__metadata__":
            raise ValueError(f"tensor '{name}' is declared twice" if name in self._names else f"'{name}' is reserved")
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor '{name}': safetensors has no {dtype}")
        tensor = _Declared(name, dtype, tuple(shape))
        self._names.add(name)
        shard = self._shards[-1]
        if shard.tensors and shard.nbytes + tensor.nbytes > self.max_shard_bytes:
            shard = _Shard()
            self._shards.append(shard)
        shard.tensors.append(tensor)
        shard.nbytes += tensor.nbytes

    def nbytes(self) -> int:
        """Bytes of all files of what is declared, before any is written: tensors, headers and the index."""
        self._planned()
        heads = sum(len(shard.layout(self._said)[0]) for shard in self._shards)
        index = len(json_text(self._index()).encode()) if len(self._shards) > 1 else 0
        return heads + index + sum(shard.nbytes for shard in self._shards)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor.

        Raises:
            ValueError: it is not the next one declared, or has another dtype or shape.
            OutputError: the disk is full, the folder read-only.
        """
        given = _Declared(name, tensor.dtype, tuple(tensor.shape))
        number, declared = self._next(name)
        if given != declared:
            raise ValueError(f"{given} was written where {declared} is next")
        self._write_parts(number, declared, [tensor])

    def write_parts(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Write the next tensor from pieces that lie one after another in it, such as the experts of a stack.

        Raises:
            ValueError: it is not the next one declared, or the parts have another dtype or make another size.
            OutputError: the disk is full, the folder read-only.
        """
        self._write_parts(*self._next(name), parts)

    def _next(self, name: str) -> tuple[int, _Declared]:
        plan = self._planned()
        if self._done == len(plan):
            raise ValueError(f"tensor '{name}' was not declared")
        if plan[self._done][1].name != name:
            raise ValueError(f"tensor '{name}' was written where {plan[self._done][1]} is next")
        return plan[self._done]

    def _write_parts(self, number: int, declared: _Declared, parts: Iterable[torch.Tensor]) -> None:
        written = 0
        for part in parts:
            data = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            if part.dtype != declared.dtype or written + len(data) > declared.nbytes:
                raise ValueError(f"a part of {part.dtype} {tuple(part.shape)} does not fit {declared}")
            with translated_os_errors(self.folder / self._file_name(number)):
                file, offsets = self._shard_file(number)
                file.seek(offsets[declared.name] + written)
                file.write(data)
            written += len(data)
        if written != declared.nbytes:
            raise ValueError(f"{written} bytes were written where {declared} is next")
        self._done += 1

    def close(self) -> None:
        """Finish the files and write the index.

        Raises:
            ValueError: a declared tensor was not written.
            OutputError: the disk is full, the folder read-only.
        """
        plan = self._planned()
        if self._done < len(plan):
            raise ValueError(f"tensor '{plan[self._done][1].name}' was declared and not written")
        with translated_os_errors(self.folder):
            if not plan:
                self._shard_file(0)
            self._finish_shard()
        if len(self._shards) > 1:
            write_json(self.folder / INDEX_FILE, self._index())

    def _index(self) -> dict[str, object]:
        """Which file holds each tensor."""
        weight_map = {tensor.name: self._file_name(number) for number, tensor in self._planned()}
        return {"metadata": {"total_size": sum(shard.nbytes for shard in self._shards)}, "weight_map": weight_map}

    def _planned(self) -> list[tuple[int, _Declared]]:
        if self._plan is None:
            self._plan = [(number, tensor) for number, shard in enumerate(self._shards) for tensor in shard.tensors]
        return self._plan

    def _file_name(self, number: int) -> str:
        if len(self._shards) == 1:
            return SINGLE_FILE
        return f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _shard_file(self, number: int) -> tuple[BinaryIO, dict[str, int]]:
        """The open file of a shard and its tensors' offsets; opening one finishes the one before."""
        if self._open is None or self._open[0] != number:
            self._finish_shard()
            self.folder.mkdir(parents=True, exist_ok=True)
            head, offsets = self._shards[number].layout(self._said)
            file = (self.folder / self._file_name(number)).open("wb")
            self._open = (number, file, offsets)
            file.write(head)
        return self._open[1], self._open[2]

    def _finish_shard(self) -> None:
        if self._open is None:
            return
        file = self._open[1]
        self._open = None
        with file:
            file.flush()
            os.fsync(file.fileno())
