"""The tensors of a GGUF file: which dtype is which type, and any of them dequantized, a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import gguf
import numpy
import torch
from numpy.typing import NDArray

from quantkit.errors import SourceError
from quantkit.gguf.head import GGUFHead, GGUFTensor

CHUNK_VALUES = 1 << 23
FLOATS = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}


MATRICES = {
    torch.float32: gguf.GGMLQuantizationType.F16,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}
"""By the dtype of a float matrix, the type in which llama.cpp expects it."""


def float_kind(dtype: torch.dtype, shape: Sequence[int]) -> gguf.GGMLQuantizationType:
    """The type in which a file holds a float tensor: vectors in F32, matrices in 16 bits."""
    return MATRICES[dtype] if len(shape) > 1 else gguf.GGMLQuantizationType.F32


def is_quantized(head: GGUFHead) -> bool:
    """Whether any tensor is stored as codes."""
    return any(tensor.kind not in FLOATS for tensor in head.tensors.values())


def natural_dtype(head: GGUFHead) -> torch.dtype:
    """The dtype that the file's matrices have; float16, that of the blocks' scales, where they are quantized."""
    kinds = {tensor.kind for tensor in head.tensors.values() if len(tensor.shape) > 1}
    return FLOATS.get(kinds.pop(), torch.float16) if len(kinds) == 1 else torch.float16


def dequantized(head: GGUFHead, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in ``dtype``, computed in float32 and rounded once, a few rows at a time.

    Raises:
        SourceError: a value is too large for ``dtype``, the file became shorter since its head was read, or the
            ``gguf`` package cannot dequantize this type.
    """
    tensor = head.tensors[name]
    out = torch.empty(tensor.shape, dtype=dtype)
    rows = out.view(-1, tensor.shape[-1])
    row_bytes = tensor.nbytes // len(rows)
    step = max(1, CHUNK_VALUES // tensor.shape[-1])
    with head.path.open("rb") as file:
        file.seek(tensor.start)
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            packed = numpy.fromfile(file, dtype=numpy.uint8, count=len(part) * row_bytes)
            if packed.size < len(part) * row_bytes:
                raise SourceError(f"{head.path} ends inside tensor '{name}'", "download the file again")
            values = _dequantize(head, tensor, packed.reshape(len(part), row_bytes))
            part.copy_(values)
            if bool((part.isinf() & values.isfinite()).any()):
                raise SourceError(
                    f"{head.path}: tensor '{name}' holds values too large for {str(dtype).removeprefix('torch.')}",
                    "set model.dtype: float32",
                )
    return out


def _dequantize(head: GGUFHead, tensor: GGUFTensor, packed: NDArray[numpy.uint8]) -> torch.Tensor:
    try:
        return torch.from_numpy(gguf.quants.dequantize(packed, tensor.kind))
    except NotImplementedError as error:
        raise SourceError(
            f"{head.path}: tensor '{tensor.name}' has the type {tensor.kind.name}, which cannot be dequantized here",
            "give a file of another type, or the model that it was made from",
        ) from error
