"""Inputs of a layer rounded as runtimes round them, and given back as floats.

Scales are those of vLLM's kernels, in float32: ``max|x| / 127`` and ``max|x| / 448`` of a token for 8-bit integers and
floats, E4M3 numbers under a scale of the tensor for NVFP4, powers of two for MXFP4. compressed-tensors gives the same
floats of 4 and 8 bits, and for integers divides by 127.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantkit.schemes.grids.blockfloat import (
    E4M3_HIGHEST,
    HIGHEST,
    local_scales,
    nearest_e2m1,
    power_of_two,
    spanning_exponents,
)
from quantkit.schemes.rounding import GROUPS, TOKEN, InputRounding
from quantkit.system.products import product

SMALLEST_SCALE = {"int8": torch.finfo(torch.float32).tiny, "fp8": 1 / (E4M3_HIGHEST * 512)}
"""Of a token; that of floats is vLLM's."""


def round_inputs(values: torch.Tensor, rounding: InputRounding, scale: torch.Tensor | None = None) -> torch.Tensor:
    """What a layer computes with in the place of its inputs.

    Args:
        values: ``[..., in_features]``, in any dtype.
        rounding: how.
        scale: the static scale, float32 ``[1]``, see :data:`quantkit.schemes.rounding.INPUT_SCALE`; None where scales
            come with the inputs.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: the rounding is static, and there is no scale.
    """
    if rounding.static and scale is None:
        raise ValueError(f"inputs rounded to {rounding.describe()} need a static scale")
    if values.numel() == 0:
        return values
    floats = values.float()
    if rounding.numbers in GROUPS:
        found = _blocks(_grouped(floats, GROUPS[rounding.numbers]), rounding, scale).flatten(-2)
    elif rounding.group_size == TOKEN:
        found = _eight_bits(floats, rounding, scale)
    else:
        found = _eight_bits(_grouped(floats, rounding.group_size), rounding, scale).flatten(-2)
    if rounding.outliers:
        columns = (floats.abs() >= rounding.outliers).flatten(0, -2).any(0)
        found = torch.where(columns, floats, found)
    return found.to(values.dtype)


def _grouped(values: torch.Tensor, size: int) -> torch.Tensor:
    return values.reshape(*values.shape[:-1], -1, size)


def static_scale(largest: torch.Tensor, rounding: InputRounding) -> torch.Tensor:
    """The static scale that spans inputs up to a magnitude, float32 ``[1]``; 1 where that is zero or too small.

    Args:
        largest: 0-d, the largest magnitude; ``[n]`` for as many scales.
        rounding: a static one.
    """
    largest = largest.float().clamp(min=torch.finfo(torch.float32).tiny)
    found = rounding.highest / largest if rounding.numbers == "nvfp4" else largest / rounding.highest
    usable = found.isfinite() & (found >= torch.finfo(torch.float32).tiny)
    return torch.where(usable, found, 1.0).reshape(-1)


SHRINKS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.33, 0.27, 0.22, 0.18, 0.15, 0.12, 0.1)
"""Shares of the largest magnitude that a static scale of integers may span."""


def searched_scale(
    largest: torch.Tensor, sample: torch.Tensor, weights: Sequence[torch.Tensor], rounding: InputRounding
) -> torch.Tensor:
    """The static scale at which layers lose least of their outputs on some tokens, float32 ``[1]``.

    What lies beyond it is clipped. Integers of one scale leave few steps to most inputs where some are far larger.

    Args:
        largest: 0-d, the largest magnitude of all tokens.
        sample: the inputs of some, float32 ``[tokens, in_features]``.
        weights: of the layers that read them, float32 ``[out_features, in_features]``.
        rounding: a static one.
    """
    scales = [static_scale(largest * shrink, rounding) for shrink in SHRINKS]
    errors = []
    for scale in scales:
        missing = sample - round_inputs(sample, rounding, scale)
        errors.append(sum(product(missing, weight.T).square().sum() for weight in weights))
    return torch.stack(scales)[torch.stack([torch.as_tensor(each) for each in errors]).argmin()]


def _eight_bits(values: torch.Tensor, rounding: InputRounding, scale: torch.Tensor | None) -> torch.Tensor:
    """Integers or floats of 8 bits; what the last dimension holds shares a scale."""
    if scale is None:
        spans = values.abs()
        if rounding.outliers:
            spans = torch.where(spans >= rounding.outliers, 0.0, spans)
        scale = spans.amax(-1, keepdim=True) / rounding.highest
        scale = scale.clamp(min=SMALLEST_SCALE[rounding.numbers])
    else:
        scale = scale.to(values.device)
    steps = values / scale
    if rounding.numbers == "int8":
        return steps.round_().clamp_(-128, 127).mul_(scale)
    return steps.clamp_(-E4M3_HIGHEST, E4M3_HIGHEST).to(torch.float8_e4m3fn).float().mul_(scale)


def _blocks(groups: torch.Tensor, rounding: InputRounding, scale: torch.Tensor | None) -> torch.Tensor:
    """E2M1 numbers of blocks ``[..., groups, inputs]``."""
    largest = groups.abs().amax(-1, keepdim=True)
    if scale is None:
        scales = torch.where(largest.isfinite(), power_of_two(spanning_exponents(largest)), torch.nan)
    else:
        common = scale.to(groups.device)
        scales = local_scales(largest / HIGHEST, common).float() / common
    return nearest_e2m1(groups / scales).mul_(scales)
