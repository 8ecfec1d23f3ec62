"""How precisely the calibration pass computes.

The activations that a layer is calibrated on, and the statistics of them, need far less precision than the
solve: a rounding of 2⁻⁹ per value averages out over tens of thousands of tokens, and the damping is many
times larger. So where the hardware multiplies 16-bit matrices several times faster than float32 (AMX on
CPUs, the tensor cores of GPUs), the forward passes run in 16 bits. The layers themselves are solved in
full float32, from the weights as they are in the checkpoint.
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
    # torch has no public way to ask; where it no longer answers, the passes are right in float32, and slower.
    has_amx: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available
    return torch.bfloat16 if has_amx() and has_onednn() else torch.float32


def training_dtype(device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """The dtype of passes that are run backward: never float16, in which gradients vanish.

    On CPUs it is bfloat16 also where these multiply bfloat16 by AVX-512 instructions, five times as fast as float32:
    a training is hundreds of passes.
    """
    if device.type == "cuda":
        return torch.bfloat16
    multiplies: Callable[[], bool] = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available
    return torch.bfloat16 if multiplies() and has_onednn() else pass_dtype(device, checkpoint)


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
