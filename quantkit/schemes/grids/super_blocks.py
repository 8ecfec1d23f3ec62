"""Scales and minima of K-quants: fitted to each sub-block, then rounded together to whole steps of a super-block's.

Of each of some ranges the nearest codes ``q`` are taken, and the scale ``s`` and minimum ``m >= 0`` of least error for
them follow from ``[qHq, -qH1; -1Hq, 1H1] [s; m] = [qHw; -1Hw]``, with the weights ``w`` of a sub-block and the form
``H`` in which their errors count; llama.cpp's ``make_qkx3_quants`` does so with a diagonal ``H``. Rounding ``(s, m)``
by ``e`` then costs ``e [qHq, -qH1; -1Hq, 1H1] eᵀ``: many steps of a super-block are judged without coding anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from quantkit.schemes.ggml import GgmlScheme
from quantkit.schemes.grids.integer import NARROWEST

WIDEST = 1.05
"""The widest range that is tried, as a share of the full one."""
TINY = 1e-30
"""Scales of groups of zeros, to divide by."""
FARTHEST = 2.0
"""How far the scale of least error for a candidate's codes may be from the candidate's own, as a factor."""
SINGULAR = 1e-6
"""Share of the product of its diagonal below which a determinant counts as zero."""
LEAST = 2.0**-24
"""The smallest float16 above zero."""
FEWER = 12
"""Onto how many whole steps below the highest the largest scale of a super-block is tried."""

Weigh = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Steps:
    """The pieces of which the scales of sub-blocks are made, float32 that the types can hold.

    Attributes:
        scale: of each super-block, ``[rows, super-blocks]``.
        minimum: likewise; None where the type has no minima.
        scale_steps: whole numbers, ``[rows, groups]``, none of them zero.
        minimum_steps: likewise, zeros among them.
    """

    scale: torch.Tensor
    minimum: torch.Tensor | None
    scale_steps: torch.Tensor
    minimum_steps: torch.Tensor | None

    def scales(self) -> torch.Tensor:
        """The scale of each group, ``[rows, groups]``."""
        return _product(self.scale, self.scale_steps)

    def minima(self) -> torch.Tensor | None:
        """What is taken off each group, ``[rows, groups]``."""
        if self.minimum is None or self.minimum_steps is None:
            return None
        return _product(self.minimum, self.minimum_steps)


def joined(parts: Sequence[Steps]) -> Steps:
    """The steps of some rows after another."""
    names = [name for name in Steps.__slots__ if getattr(parts[0], name) is not None]
    found = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Steps(**{name: found.get(name) for name in Steps.__slots__})  # type: ignore[arg-type]  # None as it was


def _product(of_blocks: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    return (of_blocks.unsqueeze(-1) * steps.view(*of_blocks.shape, -1)).view_as(steps)


def spanning(scheme: GgmlScheme, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale, and the minimum if there are any, of each group's whole range."""
    return candidates(scheme, groups, 1, widest=1.0)[0]


def candidates(
    scheme: GgmlScheme, groups: torch.Tensor, count: int, widest: float = WIDEST
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Scales, and minima if there are any, of ranges from the widest one down, each ``[rows, groups]``.

    Ranges shrink towards their middle. Without minima the side on which levels reach further is that of the weight of
    largest magnitude.
    """
    narrowest, low, high = NARROWEST[scheme.bits], groups.amin(-1), groups.amax(-1)
    shrinks = [widest - (widest - narrowest) * index / max(1, count - 1) for index in range(count)]
    if not scheme.minima:
        full = -torch.where(-low >= high, low, high) / scheme.zero
        full = torch.where(full.abs() < TINY, TINY, full)
        return [(full * shrink, None) for shrink in shrinks]
    low.clamp_(max=0)
    width = torch.maximum(high - low, torch.full_like(low, TINY))
    last = (1 << scheme.bits) - 1
    return [(width * (shrink / last), (-low - width * ((1 - shrink) / 2)).clamp_(min=0)) for shrink in shrinks]


def fit(scheme: GgmlScheme, groups: torch.Tensor, weigh: Weigh, count: int) -> Steps:
    """The steps of least weighted error.

    Args:
        scheme: a K-quant.
        groups: float32 ``[rows, groups, weights]``.
        weigh: gives ``groups @ H``.
        count: ranges tried per group.
    """
    form = _Form(scheme, groups, weigh)
    best = _best(form, candidates(scheme, groups, count))
    return _stepped(scheme, best)


@dataclass(frozen=True, slots=True)
class _Fit:
    """The best scale and minimum of each group for some codes, and the form in which leaving them costs.

    Attributes:
        scale, minimum: ``[rows, groups]``; minima are zero where the type has none.
        square, cross, ones: ``qHq``, ``qH1`` and ``1H1``.
        gain: by how much the error of leaving the group out is lowered.
    """

    scale: torch.Tensor
    minimum: torch.Tensor
    square: torch.Tensor
    cross: torch.Tensor
    ones: torch.Tensor
    gain: torch.Tensor

    def better(self, other: _Fit) -> _Fit:
        """Of each group the one that gains more; what is not a number is kept, for the grids to refuse."""
        better = torch.logical_not(other.gain <= self.gain)
        return _Fit(*(torch.where(better, getattr(other, name), getattr(self, name)) for name in _Fit.__slots__))


class _Form:
    """The error of the codes of some groups as a form in their scales and minima."""

    def __init__(self, scheme: GgmlScheme, groups: torch.Tensor, weigh: Weigh) -> None:
        self.scheme, self.groups, self.weigh = scheme, groups, weigh
        self.weighted = weigh(groups)
        self.total = self.weighted.sum(-1)
        self.ones = weigh(torch.ones_like(groups[:1])).sum(-1).expand(groups.shape[:2])
        self.none = torch.zeros(groups.shape[:2], device=groups.device)

    def fitted(self, scale: torch.Tensor, minimum: torch.Tensor | None) -> _Fit:
        """The scale and minimum that suit the codes of these best."""
        last, zero = (1 << self.scheme.bits) - 1, self.scheme.zero
        inverse = (1 / scale).unsqueeze(-1)
        if minimum is None:
            codes = (self.groups * inverse).round_().clamp_(-zero, last - zero)
        else:
            codes = torch.addcmul((minimum / scale).unsqueeze(-1), self.groups, inverse).round_().clamp_(0, last)
        pulled = self.weigh(codes)
        cross = self.none if minimum is None else pulled.sum(-1)
        square = pulled.mul_(codes).sum(-1)
        along = codes.mul_(self.weighted).sum(-1)
        if minimum is None:
            best, taken = along / square.clamp(min=TINY), self.none
        else:
            best, taken = _least_squares(square, cross, self.ones, along, self.total)
        near = (best * scale > 0) & (best.abs() < FARTHEST * scale.abs()) & (best.abs() * FARTHEST > scale.abs())
        best = torch.where(near, best, scale)
        taken = self.none if minimum is None else torch.where(near, taken, minimum)
        gain = 2 * (best * along - taken * self.total)
        gain -= best.square() * square - 2 * best * taken * cross + taken.square() * self.ones
        return _Fit(best, taken, square, cross, self.ones, gain)


def _least_squares(
    square: torch.Tensor, cross: torch.Tensor, ones: torch.Tensor, along: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of least error, the minimum not below zero."""
    determinant = square * ones - cross * cross
    scale = (along * ones - cross * total) / determinant
    minimum = (cross * along - square * total) / determinant
    alone = (minimum < 0) | (determinant <= SINGULAR * square * ones)
    return torch.where(alone, along / square.clamp(min=TINY), scale), torch.where(alone, 0.0, minimum)


def _best(form: _Form, tried: Iterable[tuple[torch.Tensor, torch.Tensor | None]]) -> _Fit:
    """The best of some ranges, each with the codes of its own best scale and minimum."""
    best: _Fit | None = None
    for scale, minimum in tried:
        first = form.fitted(scale, minimum)
        found = form.fitted(first.scale, None if minimum is None else first.minimum)
        best = found if best is None else best.better(found)
    if best is None:
        raise ValueError("no range is to be tried")
    return best


def rounded_steps(scheme: GgmlScheme, scales: torch.Tensor, minima: torch.Tensor | None) -> Steps:
    """The nearest steps of scales and minima ``[rows, groups]``, the largest of each super-block on the last step."""
    per, lowest = scheme.block // scheme.sub_block, _farthest(scheme)
    scale = _half(_largest(scales, per) / lowest)
    steps = _scale_steps(scheme, scales, scale)
    if minima is None:
        return Steps(scale, None, steps, None)
    highest = scheme.steps[1]
    minimum = _half_or_none(_largest(minima, per) / highest)
    return Steps(scale, minimum, steps, _minimum_steps(highest, minima, minimum))


def _stepped(scheme: GgmlScheme, best: _Fit) -> Steps:
    """The steps that cost least, of several scales of each super-block, and then of several of its minima."""
    per, farthest = scheme.block // scheme.sub_block, _farthest(scheme)
    largest = _largest(best.scale, per)
    slope = best.cross / best.ones.clamp(min=TINY)
    stiffness = best.square - slope * best.cross  # of a scale whose minimum gives way
    scale, steps = _cheapest(
        [_half(largest / number) for number in _numbers(farthest)],
        lambda tried: _scale_steps(scheme, best.scale, tried),
        lambda tried, whole: stiffness * (_product(tried, whole) - best.scale).square(),
    )
    if not scheme.minima:
        return Steps(scale, None, steps, None)
    wanted = (best.minimum + slope * (_product(scale, steps) - best.scale)).clamp_(min=0)
    highest, largest = scheme.steps[1], _largest(wanted, per)
    minimum, minimum_steps = _cheapest(
        [_half_or_none(largest / number) for number in _numbers(highest)],
        lambda tried: _minimum_steps(highest, wanted, tried),
        lambda tried, whole: best.ones * (_product(tried, whole) - wanted).square(),
    )
    return Steps(scale, minimum, steps, minimum_steps)


def _cheapest(
    tried: Iterable[torch.Tensor],
    steps_of: Callable[[torch.Tensor], torch.Tensor],
    cost_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of scales of super-blocks ``[rows, super-blocks]`` with their steps the ones of least cost."""
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for scale in tried:
        steps = steps_of(scale)
        cost = cost_of(scale, steps).view(*scale.shape, -1).sum(-1)
        if best is None:
            best = cost, scale, steps
            continue
        better = cost < best[0]
        whole = torch.where(better.unsqueeze(-1), steps.view(*scale.shape, -1), best[2].view(*scale.shape, -1))
        best = torch.where(better, cost, best[0]), torch.where(better, scale, best[1]), whole.view_as(steps)
    if best is None:
        raise ValueError("no scale is to be tried")
    return best[1], best[2]


def _farthest(scheme: GgmlScheme) -> int:
    """The step of largest magnitude."""
    lowest, highest = scheme.steps
    return lowest if -lowest > highest else highest


def _numbers(farthest: int) -> list[float]:
    """Steps onto which the largest scale is tried; a little beyond the last it is clipped."""
    sign, size = (1 if farthest > 0 else -1), abs(farthest)
    fewer = min(FEWER, size // 3)
    return [sign * (size - each) for each in range(fewer)] + [sign * (size + each) for each in (0.7, 1.5)]


def _largest(values: torch.Tensor, per: int) -> torch.Tensor:
    """The value of largest magnitude of each super-block, ``[rows, super-blocks]``."""
    blocks = values.view(values.shape[0], -1, per)
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)


def _half(values: torch.Tensor) -> torch.Tensor:
    """Rounded to float16, but not to zero; what is beyond its range becomes infinite, for the grids to refuse."""
    rounded = values.half().float()
    return torch.where(rounded == 0, torch.where(values < 0, -LEAST, LEAST), rounded)


def _half_or_none(values: torch.Tensor) -> torch.Tensor:
    """Like :func:`_half`, for minima, which may all be zero."""
    return torch.where(values > 0, _half(values), values)


def _scale_steps(scheme: GgmlScheme, scales: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest whole steps of scales, none of them zero."""
    lowest, highest = scheme.steps
    per = scheme.block // scheme.sub_block
    wanted = scales.view(*scale.shape, per) / scale.unsqueeze(-1)
    steps = wanted.round().clamp_(lowest, highest)
    return torch.where(steps == 0, torch.where(wanted < 0, -1.0, 1.0), steps).view_as(scales)


def _minimum_steps(highest: int, minima: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """The nearest whole steps of minima."""
    wanted = minima.view(*minimum.shape, -1) / minimum.clamp(min=TINY).unsqueeze(-1)
    return wanted.round_().clamp_(0, highest).view_as(minima)
