"""How precisely the calibration pass multiplies.

Statistics of inputs and the activations that give them need far less precision than the solve: a rounding
of 2⁻⁹ per product averages out over tens of thousands of tokens, and the damping is thousands of times
larger. Where the processor multiplies bfloat16 several times faster than float32 (AMX on CPUs, tensor
cores on GPUs), the pass lets matrix products round their inputs so, while everything else, accumulation
included, stays float32. The solve itself always runs in full float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def fast_products() -> bool:
    """Whether matrix products of float32 on CPU are set to run in bfloat16."""
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def supports_fast_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware tiles."""
    return bool(torch.cpu._is_amx_tile_supported()) and torch.backends.mkldnn.is_available()


@contextmanager
def products(fast: bool) -> Iterator[None]:
    """Matrix products of float32 on CPU in bfloat16 inside the block, as before outside of it."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if fast else "ieee"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
