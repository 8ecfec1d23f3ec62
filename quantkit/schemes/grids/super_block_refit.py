"""The scales of K-quants refitted to codes: float16 scales of super-blocks, and the whole steps of their sub-blocks.

With the codes held, the layer error ``Σ (w - ŵ) H (w - ŵ)ᵀ`` of a row is quadratic in each pair of scale and minimum,
so the best change of a pair follows from its slope and two-by-two form. Super-block after super-block, its ``d`` and
``dmin`` take their best float16 values, then the steps of each sub-block their best whole numbers; a change that does
not lower the error is left out. What is lost elsewhere in the row counts in all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.schemes.ggml import GgmlScheme
from quantkit.schemes.grids.super_blocks import SINGULAR, TINY, Steps
from quantkit.system.products import product


def refit(scheme: GgmlScheme, weight: torch.Tensor, codes: torch.Tensor, steps: Steps, hessian: torch.Tensor) -> Steps:
    """Steps that suit some codes better.

    Args:
        scheme: a K-quant.
        weight: float32 ``[columns, rows]``.
        codes: whole float32 ``[columns, rows]``.
        steps: of its scales and minima.
        hessian: float32 ``[columns, columns]``, positive definite.
    """
    levels = codes if scheme.minima else codes - scheme.zero
    row = _Rows(scheme, levels, steps, hessian)
    missing = row.missing(weight)
    for block in range(weight.shape[0] // scheme.block):
        start, stop = block * scheme.block, (block + 1) * scheme.block
        slope = product(hessian[start:stop], missing)
        missing[start:stop] -= row.block_change(block, slope)
        for group in range(start // scheme.sub_block, stop // scheme.sub_block):
            missing_of = slice(group * scheme.sub_block, (group + 1) * scheme.sub_block)
            missing[missing_of] -= row.group_change(group, start, slope)
    return row.steps()


class _Rows:
    """The scales of all rows of a layer while they are refitted, transposed: ``[groups, rows]``."""

    def __init__(self, scheme: GgmlScheme, levels: torch.Tensor, steps: Steps, hessian: torch.Tensor) -> None:
        self.scheme, self.levels, self.hessian = scheme, levels, hessian
        self.per = scheme.block // scheme.sub_block
        self.scale, self.scale_steps = steps.scale.T.contiguous(), steps.scale_steps.T.contiguous()
        none = torch.zeros_like(self.scale), torch.zeros_like(self.scale_steps)
        self.minimum = none[0] if steps.minimum is None else steps.minimum.T.contiguous()
        self.minimum_steps = none[1] if steps.minimum_steps is None else steps.minimum_steps.T.contiguous()

    def steps(self) -> Steps:
        """The steps as they are now."""
        scale, scale_steps = self.scale.T.contiguous(), self.scale_steps.T.contiguous()
        if not self.scheme.minima:
            return Steps(scale, None, scale_steps, None)
        return Steps(scale, self.minimum.T.contiguous(), scale_steps, self.minimum_steps.T.contiguous())

    def missing(self, weight: torch.Tensor) -> torch.Tensor:
        """The float weight less the quantized one."""
        size = self.scheme.sub_block
        scales = (self.scale_steps * self.scale.repeat_interleave(self.per, 0)).repeat_interleave(size, 0)
        found = torch.addcmul(weight, self.levels, scales, value=-1)
        if self.scheme.minima:
            minima = self.minimum_steps * self.minimum.repeat_interleave(self.per, 0)
            found.view(-1, size, weight.shape[1]).add_(minima.unsqueeze(1))
        return found

    def block_change(self, block: int, slope: torch.Tensor) -> torch.Tensor:
        """Refit the scale and the minimum of a super-block.

        Args:
            block: its index.
            slope: ``hessian @ missing`` of its columns, ``[columns of a block, rows]``; it is kept up to date.

        Returns:
            What its quantized weights change by.
        """
        start, stop = block * self.scheme.block, (block + 1) * self.scheme.block
        groups, size = slice(block * self.per, (block + 1) * self.per), self.scheme.sub_block
        levels = self.levels[start:stop].view(self.per, size, -1)
        along = (levels * self.scale_steps[groups].unsqueeze(1)).view(stop - start, -1)
        taken = self.minimum_steps[groups].repeat_interleave(size, 0).neg_() if self.scheme.minima else None
        pair = _Pair.of(self.hessian[start:stop, start:stop], along, taken, slope)
        rise, fall = pair.best()
        scale = _finite_half(self.scale[block] + rise, self.scale[block])
        rise = torch.where(scale * self.scale[block] > 0, scale - self.scale[block], 0.0)
        minimum = _finite_half((self.minimum[block] + pair.given(rise)).clamp_(min=0), self.minimum[block])
        rise, fall = pair.if_better(rise, minimum - self.minimum[block])
        self.scale[block] += rise
        self.minimum[block] += fall
        slope -= pair.pull(rise, fall)
        return pair.change(rise, fall)

    def group_change(self, group: int, start: int, slope: torch.Tensor) -> torch.Tensor:
        """Refit the steps of a sub-block.

        Args:
            group: its index in the row.
            start: the first column of its super-block.
            slope: see :meth:`block_change`.

        Returns:
            What its quantized weights change by.
        """
        size, block = self.scheme.sub_block, group // self.per
        first, last = group * size, (group + 1) * size
        own = slice(first - start, last - start)
        along = self.levels[first:last] * self.scale[block]
        taken = self.minimum[block].neg().expand_as(along) if self.scheme.minima else None
        pair = _Pair.of(self.hessian[first:last, first:last], along, taken, slope[own])
        best = self._whole(group, pair)
        self.scale_steps[group] += best[0]
        self.minimum_steps[group] += best[1]
        change = pair.change(*best)
        slope -= self.hessian[start : start + self.scheme.block, first:last] @ change
        return change

    def _whole(self, group: int, pair: _Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """The best change of a sub-block's steps by whole numbers."""
        lowest, highest = self.scheme.steps
        now, taken_now = self.scale_steps[group], self.minimum_steps[group]
        wanted = (now + pair.best()[0]).floor_()
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for further in (0, 1):
            steps = (wanted + further).clamp_(lowest, highest)
            rise = torch.where(steps * now > 0, steps - now, 0.0)
            fall = (taken_now + pair.given(rise)).round_().clamp_(0, highest) - taken_now
            found.append((rise, fall if self.scheme.minima else torch.zeros_like(rise)))
        (rise, fall), (higher, lower) = found
        better = pair.cost(higher, lower) < pair.cost(rise, fall)
        return pair.if_better(torch.where(better, higher, rise), torch.where(better, lower, fall))


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two directions in which some weights of each row can change, and what that does to the row's error.

    Attributes:
        along, taken: the directions, ``[columns, rows]``; the second is None where there is one only.
        pulled, pulled_taken: the form times them.
        square, cross, ones: the form between them, ``[rows]``.
        gain, gain_taken: half of how fast the error falls along them.
    """

    along: torch.Tensor
    taken: torch.Tensor | None
    pulled: torch.Tensor
    pulled_taken: torch.Tensor | None
    square: torch.Tensor
    cross: torch.Tensor
    ones: torch.Tensor
    gain: torch.Tensor
    gain_taken: torch.Tensor

    @classmethod
    def of(cls, form: torch.Tensor, along: torch.Tensor, taken: torch.Tensor | None, slope: torch.Tensor) -> _Pair:
        """Of the form between their columns, and of ``hessian @ missing`` there."""
        pulled, gain = form @ along, (along * slope).sum(0)
        square = (along * pulled).sum(0).clamp_(min=TINY)
        if taken is None:
            none = torch.zeros_like(gain)
            return cls(along, None, pulled, None, square, none, none, gain, none)
        pulled_taken = form @ taken
        cross, ones = (taken * pulled).sum(0), (taken * pulled_taken).sum(0)
        return cls(along, taken, pulled, pulled_taken, square, cross, ones, gain, (taken * slope).sum(0))

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How far along each direction the error is least."""
        determinant = self.square * self.ones - self.cross.square()
        both = determinant > SINGULAR * self.square * self.ones
        rise = torch.where(both, (self.gain * self.ones - self.cross * self.gain_taken) / determinant, 0.0)
        rise = torch.where(both, rise, self.gain / self.square)
        return rise, self.given(rise)

    def given(self, rise: torch.Tensor) -> torch.Tensor:
        """How far along the second direction the error is least after a step along the first."""
        return torch.where(self.ones > 0, (self.gain_taken - self.cross * rise) / self.ones.clamp(min=TINY), 0.0)

    def cost(self, rise: torch.Tensor, fall: torch.Tensor) -> torch.Tensor:
        """By how much steps raise the error, ``[rows]``."""
        bent = self.square * rise.square() + 2 * self.cross * rise * fall + self.ones * fall.square()
        return bent - 2 * (self.gain * rise + self.gain_taken * fall)

    def if_better(self, rise: torch.Tensor, fall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The steps where they lower the error, elsewhere none."""
        better = self.cost(rise, fall) < 0
        return torch.where(better, rise, 0.0), torch.where(better, fall, 0.0)

    def change(self, rise: torch.Tensor, fall: torch.Tensor) -> torch.Tensor:
        """What the weights change by."""
        found = self.along * rise
        return found if self.taken is None else found.addcmul_(self.taken, fall)

    def pull(self, rise: torch.Tensor, fall: torch.Tensor) -> torch.Tensor:
        """The form times :meth:`change`."""
        found = self.pulled * rise
        return found if self.pulled_taken is None else found.addcmul_(self.pulled_taken, fall)


def _finite_half(values: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Values rounded to float16; where that does not hold them, others."""
    rounded = values.half().float()
    return torch.where(rounded.isfinite(), rounded, otherwise)
