"""The tensors of a GGUF file: which dtype is which type, and any of them dequantized, a few rows at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import gguf
import numpy
import torch
from numpy.typing import NDArray

from quantkit.errors import SourceError
from quantkit.gguf.head import GGUFHead, GGUFTensor
from quantkit.gguf.layouts import Values

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


WHOLE = (
    r".*norm\.weight",
    r".*\.bias",
    *(
        re.escape(gguf.TENSOR_NAMES[kind]).replace(r"\{bid\}", r"\d+") + r"(\.weight)?"
        for kind in (
            gguf.MODEL_TENSOR.POS_EMBD,
            gguf.MODEL_TENSOR.FFN_GATE_INP,
            gguf.MODEL_TENSOR.FFN_GATE_INP_SHEXP,
            gguf.MODEL_TENSOR.SSM_CONV1D,
            gguf.MODEL_TENSOR.SSM_A,
            gguf.MODEL_TENSOR.SSM_D,
            gguf.MODEL_TENSOR.SHORTCONV_CONV,
        )
    ),
)
"""Names of matrices that llama.cpp computes with in float32."""


def float_kind(name: str, dtype: torch.dtype, shape: Sequence[int]) -> gguf.GGMLQuantizationType:
    """The type of a float tensor in a file: vectors, and what llama.cpp wants so, in F32; matrices in 16 bits."""
    return gguf.GGMLQuantizationType.F32 if len(shape) < 2 or stays_whole(name) else MATRICES[dtype]


def stays_whole(name: str) -> bool:
    """Whether llama.cpp wants a tensor in float32 whatever its shape is."""
    return any(re.fullmatch(pattern, name) for pattern in WHOLE)


def is_quantized(head: GGUFHead) -> bool:
    """Whether any tensor is stored as codes."""
    return any(tensor.kind not in FLOATS for tensor in head.tensors.values())


def natural_dtype(head: GGUFHead) -> torch.dtype:
    """The dtype that the file's matrices have; float16, that of the blocks' scales, where they are quantized."""
    matrices = (each for each in head.tensors.values() if len(each.shape) > 1 and not stays_whole(each.name))
    kinds = {each.kind for each in matrices}
    return FLOATS.get(kinds.pop(), torch.float16) if len(kinds) == 1 else torch.float16


def dequantized(
    head: GGUFHead, name: str, dtype: torch.dtype, *, index: int | None = None, values: Values | None = None
) -> torch.Tensor:
    """A tensor in ``dtype``, computed in float32 and rounded once, a few rows at a time.

    Args:
        head: of the file.
        name: of the tensor.
        dtype: wanted.
        index: of a stack, the one that is wanted; by default all of it.
        values: what the file holds in place of those that are wanted.

    Raises:
        SourceError: a value is too large for ``dtype``, the file became shorter since its head was read, or the
            ``gguf`` package cannot dequantize this type.
    """
    tensor = head.tensors[name]
    out = torch.empty(tensor.shape if index is None else tensor.shape[1:], dtype=dtype)
    rows = out.view(-1, tensor.shape[-1])
    row_bytes = tensor.nbytes * tensor.shape[-1] // math.prod(tensor.shape)
    step = max(1, CHUNK_VALUES // tensor.shape[-1])
    with tensor.file.open("rb") as file:
        file.seek(tensor.start + (index or 0) * len(rows) * row_bytes)
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            packed = numpy.fromfile(file, dtype=numpy.uint8, count=len(part) * row_bytes)
            if packed.size < len(part) * row_bytes:
                raise SourceError(f"{tensor.file} ends inside tensor '{name}'", "download the file again")
            found = _dequantize(head, tensor, packed.reshape(len(part), row_bytes))
            part.copy_(found if values is None else values.from_file(found))
            if bool((part.isinf() & found.isfinite()).any()):
                raise SourceError(
                    f"{head.path}: tensor '{name}' holds values too large for {str(dtype).removeprefix('torch.')}",
                    "set model.dtype: bfloat16, which reaches as far as float32",
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
