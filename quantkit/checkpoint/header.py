"""The head of a safetensors file and the index of a sharded checkpoint, both checked before they are believed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import CheckpointError
from quantkit.system.artifacts import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
"""As many as torch has."""
METADATA = "__metadata__"
COPY_AGAIN = "download or copy the file again"
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""By the name that recipes and configs give them, the dtypes of float models."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: ``nbytes`` bytes from byte ``start`` of ``file``."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The entries of a safetensors file by name, in the order of their bytes, checked against its size.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    size, length, header = _header(file)
    try:
        entries = [_entry_of(name, facts, file, 8 + length) for name, facts in header.items() if name != METADATA]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} has no valid safetensors header", COPY_AGAIN) from error
    entries.sort(key=lambda named: (named[1].start, named[1].nbytes))
    end = 8 + length
    for name, entry in entries:
        if entry.start != end:
            raise CheckpointError(f"{file}: tensor '{name}' does not begin where the one before it ends", COPY_AGAIN)
        end += entry.nbytes
    if end != size:
        raise CheckpointError(f"{file} has {size} bytes where its header says {end}", COPY_AGAIN)
    return dict(entries)


def read_said(file: Path) -> dict[str, str]:
    """What the header of a safetensors file says of the file beside its tensors, by key; empty where it says nothing.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    said = _header(file)[2].get(METADATA)
    texts = said.items() if isinstance(said, dict) else ()
    return {key: text for key, text in texts if isinstance(text, str)}


def _header(file: Path) -> tuple[int, int, dict[str, Any]]:
    """The bytes of a file, those of its header, and the header."""
    try:
        if file.exists() and not file.is_file():
            raise CheckpointError(f"cannot read {file}: it is not a plain file", COPY_AGAIN)
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is truncated or is not a safetensors file", COPY_AGAIN)
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_distinct)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}", COPY_AGAIN) from error
    except _TwiceError as error:
        raise CheckpointError(f"{file}: the name '{error}' is given twice in its header", COPY_AGAIN) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} has no valid safetensors header", COPY_AGAIN) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has no valid safetensors header", COPY_AGAIN)
    return size, length, header


def read_index(index: Path) -> dict[str, str]:
    """Tensor name to the name of its shard, a plain file name beside the index.

    Raises:
        CheckpointError: the index is broken, or names files outside its folder.
    """
    try:
        placed: dict[str, str] = dict(read_json(index)["weight_map"])
        shards = set(placed.values())
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a valid index of shards", COPY_AGAIN) from error
    for shard in shards:
        odd = not isinstance(shard, str) or shard in ("", "..") or "\\" in shard or "\0" in shard
        if odd or Path(shard).name != shard:
            raise CheckpointError(
                f"{index} names the shard {shard!r}, which is not a plain file name", "get the model from its source"
            )
    return placed


class _TwiceError(ValueError):
    """A name that a JSON object gives twice."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


def _entry_of(name: str, facts: dict[str, Any], file: Path, data_start: int) -> tuple[str, TensorEntry]:
    if facts["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor '{name}' has dtype {facts['dtype']}, which quantkit does not know",
            f"it knows {', '.join(DTYPES)}",
        )
    dtype, shape = DTYPES[facts["dtype"]], tuple(facts["shape"])
    begin, end = facts["data_offsets"]
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError("no tensor has so many dimensions")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("sizes and offsets are counts")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{file}: the byte range of tensor '{name}' does not fit its shape", COPY_AGAIN)
    return name, TensorEntry(file, dtype, shape, data_start + begin, end - begin)
