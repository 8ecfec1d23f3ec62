"""How precisely the calibration pass computes.

The activations that a layer is calibrated on, and the statistics of them, need far less precision than the
solve: a rounding of 2⁻⁹ per value averages out over tens of thousands of tokens, and the damping is many
times larger. So where the hardware multiplies 16-bit matrices several times faster than float32 (AMX or
AVX-512 BF16 on CPUs, the tensor cores of GPUs), the forward passes run in 16 bits. The layers themselves are
solved in full float32, from the weights as they are in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def pass_dtype(device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """The dtype of the forward passes: bfloat16 where it is fast, else float32.

    On CUDA a float16 checkpoint stays in float16, which its weights are known to fit.
    """
    if device.type == "cuda":
        return checkpoint if checkpoint in (torch.float16, torch.bfloat16) else torch.bfloat16
    return torch.bfloat16 if _multiplies_bfloat16() else torch.float32


def _multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 are several times as fast as those of float32 on this CPU.

    It has instructions for them, and oneDNN, which does these products, may use them: ``ONEDNN_MAX_CPU_ISA`` can bar
    it.
    torch has no public way to ask; where it no longer answers, the passes are right in float32, and slower.
    """
    has_avx512: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", _no)
    may: Callable[[], bool] = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", _no)
    has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available
    return (multiplies_by_amx() or has_avx512()) and has_onednn() and may()


def multiplies_by_amx() -> bool:
    """Whether the CPU has AMX, in which products of bfloat16 take so little time that what is around them counts."""
    has: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", _no)
    return has()


def _no() -> bool:
    return False


def training_dtype(device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """The dtype of passes that are run backward: that of other passes, but never float16, in which gradients vanish."""
    return torch.bfloat16 if device.type == "cuda" else pass_dtype(device, checkpoint)


@contextmanager
def bfloat16_products(inputs: torch.Tensor) -> Iterator[None]:
    """Inside the block, products of float32 CPU matrices may round their inputs to bfloat16, if ``inputs`` are that.

    A plain product of bfloat16 matrices rounds its result to bfloat16 too, which can make a Gram matrix
    indefinite; this way the result is float32. The setting is put back as it was. A torch that has no such setting
    multiplies in float32, which is as right, and slower.
    """
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)  # its settings are not in its type hints
    before = getattr(settings, "fp32_precision", None)
    if before is None:
        yield
        return
    if inputs.device.type == "cpu" and inputs.dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
