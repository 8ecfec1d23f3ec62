"""Scales as a dtype can store them."""

from __future__ import annotations

import torch

from quantkit.errors import QuantizationError
from quantkit.system.host import decide


def stored(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales rounded to the dtype in which they are stored; where they vanish, the smallest number to divide by.

    A group of zeros has scale zero, and one of tiny weights may underflow to it; dividing by it must not
    give NaN. float16 keeps its subnormal numbers, which an 8-bit scale needs as soon as a group stays below
    0.008; those of the other dtypes are subnormal in float32 too, where hardware may flush them to zero.
    """
    rounded = scales.to(dtype)
    info = torch.finfo(dtype)
    least = max(info.tiny * info.eps, torch.finfo(torch.float32).tiny)
    return torch.where(rounded.abs() < least, least, rounded)


def require_held(reach: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse a grid whose values a runtime would compute as infinities.

    Args:
        reach: the largest magnitude of each cell's values.
        dtype: in which they are computed.

    Raises:
        QuantizationError: one is beyond it, or not a number.
    """
    largest = torch.finfo(dtype).max
    if not decide((reach <= largest).all()):
        name = str(dtype).removeprefix("torch.")
        raise QuantizationError(
            f"a weight is not finite or needs a scale beyond the range of {name} (its largest value is {largest:g})",
            "set model.dtype to bfloat16 or float32, whose scales reach further" if name == "float16" else "",
        )
