"""llama.cpp's own quantizer for the rows of a matrix."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

from quantkit.llama_cpp.library import library

if TYPE_CHECKING:
    import torch


def quantize_rows(
    weight: torch.Tensor, importance: torch.Tensor | None, ggml_type: str, threads: int = 1
) -> torch.Tensor:
    """The blocks of a matrix, as ``ggml_quantize_chunk`` makes them.

    Each row is quantized by itself, so that the result does not depend on the number of threads.

    Args:
        weight: float32 ``[rows, columns]`` on the CPU, finite; whole blocks of the type make up a row.
        importance: float32 ``[columns]``, how much the square of each column's error counts; None for the type's own
            measure.
        ggml_type: name of the type, such as ``Q4_K``.
        threads: rows are shared out among so many.

    Returns:
        uint8 ``[rows, bytes of a row]``.

    Raises:
        QuantkitError: llama.cpp is not installed, or does not work here.
    """
    import torch
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[ggml_type]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows, columns = weight.shape
    if columns % block:
        raise ValueError(f"{columns} columns are not whole blocks of {block}")
    source = weight.detach().to("cpu", torch.float32).contiguous()
    strength = None if importance is None else importance.detach().to("cpu", torch.float32).contiguous()
    blocks = torch.empty(rows, columns // block * block_bytes, dtype=torch.uint8)
    address = None if strength is None else strength.data_ptr()
    llama = library()

    def quantize(first: int, last: int) -> None:
        # Rows are counted from the start of both matrices.
        llama.call(
            "ggml_quantize_chunk",
            kind.value,
            source.data_ptr(),
            blocks.data_ptr(),
            first * columns,
            last - first,
            columns,
            address,
        )

    bounds = [rows * share // threads for share in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(quantize, *zip(*pairwise(bounds), strict=True)))
    return blocks
