"""A quantized weight whose scales can be trained while its codes are held.

With codes held a weight is ``level * scale``, linear in the scale of each group, so that gradients are exact and need
no straight-through estimator (EfficientQAT's second phase, Chen et al. 2024, arXiv:2407.11062). Where a scheme stores
float zero points, these can be trained too. Scales that a scheme stores on a grid
of their own, as E4M3 numbers or whole steps, are not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from quantkit.schemes import QuantizedWeight, Scheme
from quantkit.schemes.grids import Grid, Grids

FARTHEST = 4.0
"""A trained scale lies between the one that it began with divided by this and multiplied by it: no sign turns."""


def has_float_zeros(scheme: Scheme) -> bool:
    """Whether zero points are stored as floats, so that they can be trained."""
    return getattr(scheme, "zeros", None) == "float"


def can_train(scheme: Scheme) -> bool:
    """Whether the scales of a scheme can be trained: whether they are numbers that are stored one by one."""
    return scheme.quantizer is None and scheme.free_scales


@dataclass(slots=True)
class Trainable:
    """A quantized weight with parameters; made by :meth:`of`.

    Attributes:
        given: what it began as.
        factors: of the scales, float32 like :attr:`QuantizedWeight.scales`, 1 at the start; a leaf with gradients.
        shifts: of the float zero points in steps of the codes, likewise, 0 at the start; None where zeros stay.
    """

    given: QuantizedWeight
    factors: torch.Tensor
    shifts: torch.Tensor | None = None
    _grids: Grids = field(init=False)
    _order: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._grids = self.given.scheme.grids()
        if "g_idx" in self.given.parts:
            self._order = self.given.parts["g_idx"].argsort(stable=True)

    @classmethod
    def of(cls, weight: QuantizedWeight, *, zeros: bool = True) -> Trainable:
        """A weight on the device on which it is trained.

        Args:
            weight: its scheme must pass :func:`can_train`.
            zeros: train float zero points, too, where there are any.

        Raises:
            ValueError: its scales cannot be trained.
        """
        if not can_train(weight.scheme):
            raise ValueError(f"the scales of {weight.scheme.describe()} cannot be trained")
        factors = torch.ones_like(weight.scales, dtype=torch.float32, requires_grad=True)
        moves = zeros and has_float_zeros(weight.scheme)
        shifts = torch.zeros_like(weight.scales, dtype=torch.float32, requires_grad=True) if moves else None
        return cls(weight, factors, shifts)

    def parameters(self) -> dict[str, torch.Tensor]:
        """The leaves that are trained, by name."""
        return {"factors": self.factors} | ({} if self.shifts is None else {"shifts": self.shifts})

    def weight(self) -> torch.Tensor:
        """What it stands for now, float32 ``[out_features, in_features]``, with a graph back to the parameters."""
        given, grids = self.given, self._grids
        codes = given.codes if self._order is None else given.codes[:, self._order]
        levels = grids.levels(grids.grouped(codes), given.zeros, torch.float32)
        if self.shifts is not None:
            levels = levels - self.shifts.unsqueeze(-1)
        found = grids.ungrouped(levels * self._scales().unsqueeze(-1), codes.shape)
        return found if self._order is None else found[:, self._order.argsort()]

    def clamp_(self) -> None:
        """Keep the scales within reach of those that they began with; after each step."""
        with torch.no_grad():
            self.factors.clamp_(1 / FARTHEST, FARTHEST)

    def _scales(self) -> torch.Tensor:
        return self.given.scales.float() * self.factors

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """The weight with the codes that it had, and its scales and zero points rounded to what the scheme stores.

        Raises:
            QuantizationError: they reach beyond what their dtype holds.
        """
        given, grids = self.given, self._grids
        zeros = given.zeros.float() if self.shifts is None else given.zeros.float() + self.shifts
        if torch.equal(self.factors, torch.ones_like(self.factors)) and torch.equal(zeros, given.zeros.float()):
            return given
        grid: Grid = grids.stored(self._scales(), zeros, given.scales.dtype)
        kept = {name: part for name, part in given.parts.items() if name not in grid.parts}
        return replace(given, scales=grid.scales, zeros=grids.stored_zeros(grid), parts={**kept, **grid.parts})
