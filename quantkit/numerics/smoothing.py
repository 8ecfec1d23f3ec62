"""The search of AWQ (Lin et al. 2023, arXiv:2306.00978) for factors of input channels.

Channels with strong inputs get larger weights, so that rounding hurts them less, and the input is divided by the
same factors. The paper tries ``s = mean|x|**alpha`` for some alphas; with ``duo_scaling``, as its code came to do,
a channel's factor also falls with the size of its weights, ``s = mean|x|**alpha / mean|w|**(1 - alpha)``. The loss
is that of the layers' outputs over all calibration tokens, which the Gram matrix gives exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantkit.schemes import Scheme
from quantkit.system.host import number

SEARCH_ROWS = 128
"""Rows of a layer on which factors are tried: what is best for a hundred or two is best for all."""
SMALLEST = 1e-4


def pooled(values: torch.Tensor, channels: torch.Tensor | None) -> torch.Tensor:
    """Values per input channel, averaged over those that must get the same factor.

    They are summed on the CPU and in float64: a GPU adds in another order at every run.
    """
    if channels is None:
        return values
    channels, apart = channels.cpu(), values.to("cpu", torch.float64)
    total = torch.zeros_like(apart).index_add_(0, channels, apart)
    members = torch.zeros_like(apart).index_add_(0, channels, torch.ones_like(apart))
    return (total / members.clamp(min=1))[channels].to(values)


def candidate(strength: torch.Tensor, size: torch.Tensor | None, alpha: float) -> torch.Tensor:
    """Factors for one alpha, their geometric mid-range 1.

    Args:
        strength: mean ``|x|`` per channel, float32 ``[in_features]``.
        size: mean ``|w|`` per channel relative to its group's largest; None leaves it out.
        alpha: between 0 and 1.
    """
    factors = strength.clamp(min=SMALLEST).pow(alpha)
    if size is not None:
        factors = factors / (size.pow(1 - alpha) + SMALLEST)
    factors = factors.clamp(min=SMALLEST)
    return factors / (factors.amax() * factors.amin()).sqrt()


def weight_sizes(members: Sequence[tuple[torch.Tensor, Scheme]]) -> torch.Tensor:
    """Mean over all rows of ``|w|`` relative to the largest of its group, float32 ``[in_features]``."""
    total, rows = torch.zeros(members[0][0].shape[1], device=members[0][0].device), 0
    for weight, scheme in members:
        size = scheme.columns_per_group(weight.shape[1])
        width = size if weight.shape[1] % size == 0 else weight.shape[1]
        parts = weight.abs().view(weight.shape[0], -1, width)
        total += (parts / parts.amax(-1, keepdim=True).clamp(min=1e-12)).view_as(weight).sum(0)
        rows += weight.shape[0]
    return total / rows


def output_error(
    members: Sequence[tuple[torch.Tensor, Scheme]],
    gram: torch.Tensor,
    factors: torch.Tensor | None,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """Mean square error of the outputs when scaled weights are rounded to nearest, summed over rows."""
    error = torch.zeros((), device=gram.device)
    for weight, scheme in members:
        grids = scheme.grids()
        groups = grids.grouped(weight if factors is None else weight * factors)
        grid = grids.spanning(groups, scale_dtype)
        scales = grid.scales.float().unsqueeze(-1)
        missing = torch.addcmul(groups, grids.nearest_(groups / scales, grid.zeros), scales, value=-1)
        missing = grids.ungrouped(missing, weight.shape)
        if factors is not None:
            missing = missing / factors
        error += (missing @ gram).mul_(missing).sum()
    return error


def search_factors(
    members: Sequence[tuple[torch.Tensor, Scheme]],
    gram: torch.Tensor,
    strength: torch.Tensor,
    scale_dtype: torch.dtype,
    *,
    alphas: int,
    duo_scaling: bool,
    channels: torch.Tensor | None,
) -> torch.Tensor | None:
    """The factors of least output error, or None if none is better than leaving the weights as they are.

    Args:
        members: float32 ``[out_features, in_features]`` and scheme of each layer that reads the input.
        gram: float32 ``[in_features, in_features]``.
        strength: mean ``|x|`` per channel.
        scale_dtype: dtype in which scales are stored.
        alphas: how many are tried.
        duo_scaling: try factors that fall with the size of the weights as well.
        channels: see :attr:`quantkit.transforms.base.SmoothingPlace.channels`.
    """
    sampled = [(_sample(weight, scheme), scheme) for weight, scheme in members]
    strength = pooled(strength, channels)
    size = pooled(weight_sizes(members), channels) if duo_scaling else None
    tried: list[torch.Tensor | None] = [None]
    tried += [candidate(strength, size, index / alphas) for index in range(0 if duo_scaling else 1, alphas + 1)]
    errors = torch.stack([output_error(sampled, gram, factors, scale_dtype) for factors in tried])
    return tried[int(number(errors.nan_to_num(torch.inf).argmin()))]


def _sample(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Some rows of a weight; all where scales reach over rows, whose groups a choice of rows would cut."""
    step = max(1, weight.shape[0] // SEARCH_ROWS) if scheme.stacks else 1
    return weight[::step].contiguous()
