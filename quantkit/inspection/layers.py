"""One packed layer: its scheme and size, and what its decoded weights, codes and scales look like."""

from __future__ import annotations

from typing import Any

import torch

from quantkit.exports import Export
from quantkit.schemes import Decodable, Fp8Scheme, QuantizedWeight, Scheme

FAR = 6.0
"""Standard deviations beyond which a weight counts as an outlier."""
FP8_ENDS = (0x7E, 0xFE)
"""E4M3's 448 and -448."""


def layer_facts(export: Export, name: str, *, deep: bool) -> dict[str, Any]:
    """What there is to say of a layer.

    Returns:
        ``name``, ``shape``, ``weights``, ``scheme``, ``bits``, ``group_size``, ``bytes``, ``bits_per_weight``; where
        ``deep`` also ``outliers``, the share of weights beyond six standard deviations of the layer, ``largest``, the
        largest magnitude in standard deviations, ``at_ends``, the share of codes at the ends of the grid, and
        ``scales``: how many there are, and how many are ``zero``, ``denormal`` and ``non_finite``. What does not
        exist for the layer is None.

    Raises:
        CheckpointError: the file is broken.
    """
    scheme, (rows, columns), stored = export.schemes[name], export.shape(name), export.layer_bytes(name)
    facts: dict[str, Any] = {
        "name": name,
        "shape": [rows, columns],
        "weights": rows * columns,
        "scheme": scheme.describe(),
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "bytes": stored,
        "bits_per_weight": stored * 8 / (rows * columns),
    }
    return facts | _decoded_facts(export.decodable(name)) if deep else facts


def _decoded_facts(weight: Decodable) -> dict[str, Any]:
    return {
        **_outliers(weight.dequantize(torch.float32)),
        "at_ends": _at_ends(weight) if isinstance(weight, QuantizedWeight) else None,
        "scales": _scale_facts(weight.scales),
    }


def _at_ends(weight: QuantizedWeight) -> float:
    ends = torch.tensor(_ends(weight.scheme), dtype=weight.codes.dtype)
    return float(torch.isin(weight.codes, ends).sum()) / weight.codes.numel()


def _outliers(values: torch.Tensor) -> dict[str, float | None]:
    """Of the weights that are finite."""
    if not bool(values.isfinite().all()):
        values = values[values.isfinite()]
    deviation = float(values.std(correction=0)) if values.numel() else 0.0
    if not deviation:
        return {"outliers": None, "largest": None}
    magnitudes = (values - values.mean()).abs_()
    far = float((magnitudes > FAR * deviation).sum()) / values.numel()
    return {"outliers": far, "largest": float(values.abs().amax()) / deviation}


def _scale_facts(scales: torch.Tensor) -> dict[str, int]:
    tiny = torch.finfo(scales.dtype).tiny
    wide = scales.to(torch.float64)
    small = (wide != 0) & (wide.abs() < tiny)
    return {
        "count": scales.numel(),
        "zero": int((wide == 0).sum()),
        "denormal": int(small.sum()),
        "non_finite": int((~wide.isfinite()).sum()),
    }


def _ends(scheme: Scheme) -> tuple[int, ...]:
    """The codes of the lowest and the highest level."""
    if isinstance(scheme, Fp8Scheme):
        return FP8_ENDS
    table: tuple[float, ...] | None = getattr(scheme, "table", None)
    if table is None:
        return (0, (1 << scheme.bits) - 1)
    return tuple(code for code, level in enumerate(table) if level in (min(table), max(table)))
