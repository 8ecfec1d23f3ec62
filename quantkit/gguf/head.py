"""The head of a GGUF file, read: its metadata, and where its tensors lie.

The layout is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count is checked before it is
followed, so that a broken or hostile file is refused at once.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy

from quantkit.errors import SourceError
from quantkit.gguf.parts import parts_of

GIVE_FLOAT = "give the float model that the file was made from"
"""The remedy where a file cannot be read."""
OTHER_FORMAT = "choose another format, such as compressed-tensors"
"""The remedy where a model cannot be written."""
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_DIMENSIONS = 4
MAX_ARRAY_ITEMS = 1 << 22
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
"""By the number of a metadata value's type, how :mod:`struct` writes it."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor of a GGUF file: ``nbytes`` bytes from byte ``start`` of ``file``; ``shape`` is in torch's order."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int
    file: Path = Path()


@dataclass(frozen=True, slots=True)
class GGUFHead:
    """What a GGUF file says of itself.

    Attributes:
        path: the file; of one in parts the first.
        metadata: keys and values; a float32 is the shortest decimal that rounds to it.
        tensors: by name, in the order of the file.
        files: all parts of the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    files: tuple[Path, ...] = ()

    @property
    def architecture(self) -> str:
        """What the file calls the model's architecture, with which many of its keys begin."""
        return str(self.metadata.get("general.architecture"))

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number above zero under a key of the architecture.

        Raises:
            SourceError: it is no such number, or is not there and there is no default.
        """
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not int or value < 1:
            raise SourceError(f"{self.path}: the metadata key '{key}' is {value!r}, not a count", GIVE_FLOAT)
        return value

    def counts(self, key: str, length: int) -> list[int]:
        """Whole numbers from zero under a key of the architecture, not all of them zero.

        Raises:
            SourceError: there are not ``length`` such numbers.
        """
        value = self.metadata.get(f"{self.architecture}.{key}")
        whole = isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
        if not isinstance(value, list) or not whole or len(value) != length or not any(value):
            raise SourceError(f"{self.path}: the metadata key '{key}' is not a count for each block", GIVE_FLOAT)
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite float above zero under a key of the architecture.

        Raises:
            SourceError: it is no such number, or is not there and there is no default.
        """
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if type(value) is not float or not 0 < value < math.inf:
            raise SourceError(f"{self.path}: the metadata key '{key}' is {value!r}, not a positive number", GIVE_FLOAT)
        return value


def read_head(path: Path) -> GGUFHead:
    """Read and check the head of a GGUF file, or those of all parts of one where ``path`` is any of them.

    Raises:
        SourceError: the file cannot be read, is not GGUF, or is broken or truncated; parts of it are missing.
    """
    head = _read_one(path)
    count = head.metadata.get("split.count", 0)
    if count in (0, 1):
        return head
    files = parts_of(path)
    if count != len(files):
        name = f"NAME-00001-of-{count:05d}.gguf" if isinstance(count, int) else "NAME-00001-of-00002.gguf"
        raise SourceError(
            f"{path} is one of {count} parts, and its name does not tell the others", f"name it as {name}"
        )
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise SourceError(
            f"{path} is one of {count} parts, and {', '.join(missing[:5])}{' ...' if missing[5:] else ''} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it",
            "download the missing parts into the same folder",
        )
    heads = [head if file == path else _read_one(file) for file in files]
    tensors: dict[str, GGUFTensor] = {}
    for file, part in zip(files, heads, strict=True):
        twice = tensors.keys() & part.tensors.keys()
        if twice or part.metadata.get("split.count") != count:
            what = f"holds tensor '{min(twice)}' again" if twice else f"is not one of {count} parts"
            raise SourceError(f"{file} {what}", "download all parts again, of the same file")
        tensors |= part.tensors
    promised = heads[0].metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise SourceError(
            f"{files[0]} promises {promised} tensors, and its parts hold {len(tensors)}", "download all parts again"
        )
    return GGUFHead(files[0], heads[0].metadata, tensors, tuple(files))


def _read_one(path: Path) -> GGUFHead:
    try:
        if not path.is_file():
            raise SourceError(f"cannot read {path}: it is not a plain file", "check the path")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            metadata, tensor_count = _read_metadata(cursor)
            return GGUFHead(path, metadata, _read_tensors(cursor, tensor_count, metadata, path), (path,))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}", "check the path") from error
    except ValueError as error:
        raise SourceError(
            f"{path} is not a whole GGUF file: {error}", "download the file again and compare its size"
        ) from error


class _Cursor:
    """Reads forward through bytes and never past their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.place = 0
        self.items_left = MAX_ARRAY_ITEMS

    def take(self, count: int) -> int:
        """Step over ``count`` bytes; where they begin."""
        begin = self.place
        if count > self.size - begin:
            raise ValueError(f"it ends inside its header, at byte {self.size}")
        self.place = begin + count
        return begin

    def numbers(self, layout: str) -> tuple[Any, ...]:
        begin = self.take(struct.calcsize(f"<{layout}"))
        return struct.unpack_from(f"<{layout}", self.data, begin)

    def string(self) -> str:
        (length,) = self.numbers("Q")
        begin = self.take(length)
        return str(self.data[begin : begin + length], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise ValueError(f"its metadata has a value of the unknown type {kind}")
        (number,) = self.numbers(SCALARS[kind])
        return float(str(numpy.float32(number))) if kind == FLOAT32 else number

    def array(self) -> list[Any]:
        kind, count = self.numbers("IQ")
        self.items_left -= count
        if self.items_left < 0:
            raise ValueError(f"its metadata has more than {MAX_ARRAY_ITEMS} array items")
        if kind == STRING:
            return [self.string() for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"its metadata has an array of the unknown type {kind}")
        return list(self.numbers(f"{count}{SCALARS[kind]}"))


def _read_metadata(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    begin = cursor.take(4)
    if cursor.data[begin : begin + 4] != MAGIC:
        raise ValueError("it does not begin with 'GGUF'")
    (version,) = cursor.numbers("I")
    if version not in VERSIONS:
        raise ValueError(f"it has version {version}, or another byte order; versions 2 and 3 can be read")
    tensor_count, key_count = cursor.numbers("QQ")
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise ValueError(f"it claims {tensor_count} tensors and {key_count} metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        (kind,) = cursor.numbers("I")
        if key in metadata:
            raise ValueError(f"its metadata has the key '{key}' twice")
        metadata[key] = cursor.value(kind)
    return metadata, tensor_count


def _read_tensors(cursor: _Cursor, count: int, metadata: dict[str, Any], path: Path) -> dict[str, GGUFTensor]:
    rows = [_read_row(cursor) for _ in range(count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT:
        raise ValueError(f"its alignment is {alignment!r}")
    data_start = -(-cursor.place // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, kind, shape, offset in rows:
        if name in tensors:
            raise ValueError(f"it has the tensor '{name}' twice")
        tensor = GGUFTensor(name, kind, shape, data_start + offset, _bytes_of(name, kind, shape), path)
        if tensor.start + tensor.nbytes > cursor.size:
            raise ValueError(
                f"its tensor '{name}' ends at byte {tensor.start + tensor.nbytes}, and it has {cursor.size} bytes"
            )
        tensors[name] = tensor
    if sum(tensor.nbytes for tensor in tensors.values()) > cursor.size:
        raise ValueError("its tensors overlap")
    return tensors


def _read_row(cursor: _Cursor) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int]:
    name = cursor.string()
    (dimensions,) = cursor.numbers("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"its tensor '{name}' has {dimensions} dimensions")
    shape = tuple(reversed(cursor.numbers(f"{dimensions}Q")))
    kind, offset = cursor.numbers("IQ")
    return name, gguf.GGMLQuantizationType(kind), shape, offset


def _bytes_of(name: str, kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES.get(kind, (0, 0))
    if not block or 0 in shape or shape[-1] % block:
        raise ValueError(f"its tensor '{name}' has the shape {list(shape)}, which {kind.name} cannot store")
    return math.prod(shape) // int(block) * int(block_bytes)
