"""How precisely the calibration pass computes.

The activations that a layer is calibrated on, and the statistics of them, need far less precision than the
solve: a rounding of 2⁻⁹ per value averages out over tens of thousands of tokens, and the damping is many
times larger. So where the hardware multiplies 16-bit matrices several times faster than float32 (AMX or
AVX-512 BF16 on CPUs, the tensor cores of GPUs), the forward passes run in 16 bits. The layers themselves are
solved in full float32, from the weights as they are in the checkpoint.
"""

from __future__ import annotations

import torch

from quantkit.system.products import multiplies_bfloat16


def pass_dtype(device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """The dtype of the forward passes: bfloat16 where it is fast, else float32.

    On CUDA a float16 checkpoint stays in float16, which its weights are known to fit.
    """
    if device.type == "cuda":
        return checkpoint if checkpoint in (torch.float16, torch.bfloat16) else torch.bfloat16
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def training_dtype(device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """The dtype of passes that are run backward: that of other passes, but never float16, in which gradients vanish."""
    return torch.bfloat16 if device.type == "cuda" else pass_dtype(device, checkpoint)
