"""Half-quadratic fitting of integer grids to weights alone, after Badri & Shaji 2023 (HQQ).

The aim is a small ``Σ |w - ŵ|ᵖ`` with ``p < 1``, which lets a few weights be far off if most come close. The problem
is split with an auxiliary ``e`` that takes what is given up as an outlier's:
``min Σ |e|ᵖ + β/2 (w - ŵ - e)²``. For given codes the best ``e`` is about the residual ``r = w - ŵ`` shrunk,
``sign(r) max(|r| - |r|^(p-1) / β, 0)``, so that ``r - e = sign(r) min(|r|, |r|^(p-1) / β)`` is left for the grid to
make good: small residuals count in full, large ones ever less. The zero point, or scale, is then that of least
squares for what is left, and the codes are rounded anew.

All of it is written in steps, the units of a group's scale, where the update of a float zero is ``z - mean(r - e)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.schemes.grids import Grid
from quantkit.schemes.grids.base import stored
from quantkit.schemes.grids.integer import IntGrids
from quantkit.system.host import decide

CHUNK = 1 << 17
"""Weights fitted at a time on the CPU: their buffers stay in the caches."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a fit runs.

    Attributes:
        lp_norm: the ``p`` of the error, above 0 and at most 1.
        beta: ``β`` of the first iteration.
        kappa: what multiplies it after each.
        iterations: how many there are.
        in_steps: ``β`` is meant for residuals in steps of their group's scale, not in units of the weights.
    """

    lp_norm: float
    beta: float
    kappa: float
    iterations: int
    in_steps: bool

    def left(self, iteration: int, residual: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What of a residual the grid is to make good, ``r - e``, both in steps; may be ``residual`` itself.

        Args:
            iteration: from 0.
            residual: float32 ``[A, G, S]``.
            scales: float32 ``[A, G, 1]``.
        """
        weight_units = torch.ones_like(scales) if self.in_steps else scales.abs().pow(self.lp_norm - 2)
        ceiling = weight_units.div_(self.beta * self.kappa**iteration).clamp_(min=torch.finfo(torch.float32).tiny)
        magnitude = residual.abs()
        if residual.device.type == "cpu":
            # The weights of language models are so small that the published β gives up nothing: spare the powers.
            whole = magnitude.amax(-1, keepdim=True) <= ceiling.pow(1 / (2 - self.lp_norm))
            if decide(whole.all()):
                return residual
        allowed = magnitude.pow(self.lp_norm - 1).mul_(ceiling)
        return torch.copysign(torch.minimum(magnitude, allowed, out=magnitude), residual)


def fit_grid(
    weight: torch.Tensor, grids: IntGrids, scale_dtype: torch.dtype, schedule: Schedule, *, negative_scales: bool
) -> Grid:
    """The grid of a weight after all iterations, begun from the full range of each group.

    Every group is fitted by itself, so that a row's grid depends on no other row.

    Args:
        weight: float32 ``[rows, columns]``.
        grids: of an integer scheme. Float zeros are fitted with the scale held; whole ones are rounded at each
            update and the scale is fitted with them; a symmetric scheme has only its scale fitted.
        scale_dtype: dtype in which scales are stored.
        schedule: how the fit runs.
        negative_scales: see :func:`quantkit.numerics.grid_search.search_grid`.

    Raises:
        QuantizationError: the grid reaches beyond what ``scale_dtype`` holds.
    """
    groups = grids.grouped(weight)
    float_zeros = grids.scheme.zeros == "float"
    step = max(1, CHUNK // (groups.shape[1] * groups.shape[2])) if weight.device.type == "cpu" else groups.shape[0]
    fit = _fit_zeros if float_zeros else _fit_scales
    parts = []
    for part in torch.split(groups, step):
        ((scales, zeros),) = grids.candidates(part, 1, negative_scales=negative_scales)
        if float_zeros:
            scales = stored(scales, scale_dtype).float()
        parts.append(fit(part.contiguous(), scales.unsqueeze(-1), zeros.unsqueeze(-1), grids, schedule))
    scales, zeros = (torch.cat(each).squeeze(-1) for each in zip(*parts, strict=True))
    return grids.stored(scales, zeros, scale_dtype)


def _fit_zeros(
    groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, grids: IntGrids, schedule: Schedule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float zeros for scales that stay as they are, as published."""
    steps, codes, residual = groups / scales, torch.empty_like(groups), torch.empty_like(groups)
    for iteration in range(schedule.iterations):
        torch.add(steps, zeros, out=residual)
        torch.round(residual, out=codes).clamp_(0, grids.scheme.levels - 1)
        zeros = zeros - schedule.left(iteration, residual.sub_(codes), scales).mean(-1, keepdim=True)
    return scales, zeros


def _fit_scales(
    groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, grids: IntGrids, schedule: Schedule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, and unless the scheme is symmetric whole zeros.

    With ``l`` the levels and ``t = l + (r - e)`` what they should be, both in steps, the scale of least squares is
    the old one times ``Σ t l / Σ l²``. Where that is not positive, as in a group of zeros, the old one stays.
    """
    last, symmetric = grids.scheme.levels - 1, grids.scheme.symmetric
    levels, residual = torch.empty_like(groups), torch.empty_like(groups)
    for iteration in range(schedule.iterations):
        torch.div(groups, scales, out=residual)
        torch.add(residual, zeros, out=levels).round_().clamp_(0, last).sub_(zeros)
        left = schedule.left(iteration, residual.sub_(levels), scales)
        shift = torch.zeros_like(zeros) if symmetric else left.mean(-1, keepdim=True)
        moved = (zeros - shift).round_().clamp_(0, last)
        wanted = left.add_(levels)
        levels.add_(zeros - moved)
        factor = wanted.mul_(levels).sum(-1, keepdim=True) / levels.square_().sum(-1, keepdim=True)
        scales, zeros = torch.where(factor > 0, scales * factor, scales), moved
    return scales, zeros
