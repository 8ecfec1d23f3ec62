"""Weights as a QLoRA training sees them: rounded to NF4 with double quantization, and decoded again."""

from __future__ import annotations

import torch
from torch import nn

from quantkit.numerics.grid_search import encode, quantized, range_grid
from quantkit.schemes.codebook import Nf4Scheme

SCHEME = Nf4Scheme(group_size=64, double_quant=True)
"""That of bitsandbytes' ``bnb_4bit_use_double_quant``; the codes are the same."""


def nf4_round_trip(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is left of a weight in NF4.

    Args:
        weight: ``[out_features, in_features]`` of a float dtype.
        dtype: in which the model was loaded for training and the codes are decoded, so that values are rounded to it
            before and after.

    Returns:
        float32 of the same shape.
    """
    rounded = weight.to(dtype).float().reshape(-1)
    blocks = nn.functional.pad(rounded, (0, -rounded.numel() % SCHEME.group_size)).view(-1, SCHEME.group_size)
    grid = range_grid(blocks, SCHEME, torch.float32)
    found = quantized(encode(blocks, grid, SCHEME), grid, SCHEME).dequantize(torch.float32)
    return found.view(-1)[: rounded.numel()].view(weight.shape).to(dtype).float()
