"""The blocks of GGML: 32 weights of a row with their scale, in a fixed number of bytes.

A block begins with its scale ``d``, float16, and for the types whose name ends in 1 the least value ``m``, float16.
4-bit codes follow two to a byte: the first 16 weights in the lower halves, the others in the upper ones. Of 5 bits,
the fifth of each code lies before them, 32 in a row. MXFP4 has one byte of exponent in place of ``d``. See
``ggml-common.h`` in https://github.com/ggml-org/llama.cpp and ``quants.py`` of the package gguf.
"""

from __future__ import annotations

import torch

from quantkit.gguf.blocks.types import BLOCK

HALF = BLOCK // 2


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes uint8 ``[..., 32]`` to bytes ``[..., 16]``."""
    return codes[..., :HALF] | codes[..., HALF:] << 4


def from_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`nibbles`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """The highest bit of 5-bit codes uint8 ``[..., 32]`` as bytes ``[..., 4]``, the first weight lowest."""
    bits = (codes >> 4 & 1).view(*codes.shape[:-1], 4, 8)
    weights = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def from_fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`fifth_bits`: 16 or 0 for each weight, ``[..., 32]``."""
    places = torch.arange(8, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> places & 1) << 4).flatten(-2)


def half_bytes(values: torch.Tensor) -> torch.Tensor:
    """Float16 ``[...]`` as bytes ``[..., 2]``."""
    return values.contiguous().view(torch.uint8).view(*values.shape, 2)


def from_half_bytes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`half_bytes`, in float32."""
    return packed.contiguous().view(torch.float16).squeeze(-1).float()
