"""Models that their authors publish in 8-bit floats or MXFP4: what their tensors and scales say of the layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from quantkit.checkpoint import CheckpointReader

SCALES = ("_scale_inv", "_scale", ".scale", "_scales")
"""What the name of a weight's scales adds to its own."""
BLOCKS = "_blocks"
PER_BYTE = 2
"""Weights of MXFP4 in a byte."""
DECODED = "quantkit decodes it by itself: quantize, merge, and convert --to float"


def published_layers(reader: CheckpointReader) -> list[dict[str, Any]]:
    """The packed layers as :func:`quantkit.inspection.layers.layer_facts` tells them without decoding; perhaps none."""
    return list(_layers(reader))


def _layers(reader: CheckpointReader) -> Iterator[dict[str, Any]]:
    for name in reader.names():
        if reader.dtype(name).itemsize != 1 or name.endswith(SCALES):
            continue
        whole = name.removesuffix(BLOCKS)
        beside = [f"{start}{end}" for start in (whole, whole.removesuffix(".weight")) for end in SCALES]
        scales = next((each for each in beside if each in reader), None)
        if scales is None:
            continue
        shape, rows = reader.shape(name), reader.shape(scales)
        packed = not reader.dtype(name).is_floating_point
        columns = math.prod(shape[-2:]) if whole != name else shape[-1]
        sizes = (*shape[: -2 if whole != name else -1], columns * PER_BYTE) if packed else shape
        weights, nbytes = math.prod(sizes), reader.nbytes(name) + reader.nbytes(scales)
        yield {
            "name": whole.removesuffix(".weight"),
            "scheme": "mxfp4" if packed else f"{_kind(str(reader.dtype(name)))} {_shared(sizes, rows)}",
            "shape": [math.prod(sizes[:-1]), sizes[-1]],
            "weights": weights,
            "bytes": nbytes,
            "bits_per_weight": nbytes * 8 / weights,
            "tensors": [name, scales],
        }


def _kind(dtype: str) -> str:
    return f"fp8 ({dtype.rpartition('float8_')[2]})" if "float8" in dtype else dtype.removeprefix("torch.")


def _shared(shape: tuple[int, ...], scales: tuple[int, ...]) -> str:
    """What shares a scale: all of a tensor, a row, or a block."""
    if math.prod(scales) <= math.prod(shape[:-2]):
        return "tensor"
    rows, columns = scales[-2:] if len(scales) > 1 else (scales[-1], 1)
    if columns == 1:
        return "channel"
    return f"block {_power(shape[-2] / rows)}x{_power(shape[-1] / columns)}"


def _power(least: float) -> int:
    """The power of two that a block has at least, the last one of a row being cut off."""
    return 1 << math.ceil(math.log2(max(1.0, least)))
