"""The one place where the host asks the device a question.

A question waits for the device, so every one is made here and can be counted; and a trace without real
numbers (fake tensors) can answer them in its own way.
"""

from __future__ import annotations

import torch


def decide(answer: torch.Tensor) -> bool:
    """The truth of a boolean tensor of one element."""
    return bool(answer.item())


def all_finite(values: torch.Tensor) -> bool:
    """Whether numbers hold no NaN and no infinity, told by the least and the largest of them.

    That takes a twentieth of the time of asking each.
    """
    if values.is_complex():
        values = torch.view_as_real(values)
    elif values.itemsize == 1:
        values = values.float()
    return not values.numel() or decide(torch.stack(values.aminmax()).isfinite().all())


def number(value: torch.Tensor) -> float:
    """The value of a tensor of one element."""
    return float(value.item())


def numbers(values: torch.Tensor) -> list[float]:
    """The values of a vector."""
    return [float(value) for value in values.tolist()]


def whole_numbers(values: torch.Tensor) -> list[int]:
    """The values of a vector of integers."""
    return [int(value) for value in values.tolist()]
