"""The one place where the host asks the device a question.

A question waits for the device, so every one is made here and can be counted; and a trace without real
numbers (fake tensors) can answer them in its own way.
"""

from __future__ import annotations

import torch


def decide(answer: torch.Tensor) -> bool:
    """The truth of a boolean tensor of one element."""
    return bool(answer.item())


def number(value: torch.Tensor) -> float:
    """The value of a tensor of one element."""
    return float(value.item())


def numbers(values: torch.Tensor) -> list[float]:
    """The values of a vector."""
    return [float(value) for value in values.tolist()]


def whole_numbers(values: torch.Tensor) -> list[int]:
    """The values of a vector of integers."""
    return [int(value) for value in values.tolist()]
