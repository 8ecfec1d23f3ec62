"""QA-LoRA: a low-rank term that acts on the means of groups of inputs, and so merges into float zero points.

A layer with ``w = (code - zero) * scale`` in groups of columns is given ``x``. QA-LoRA (Xu et al. 2023,
arXiv:2309.14717) adds ``B A p`` to its output, where ``p`` are the sums of ``x`` over each group: every weight of a
group moves by the same ``(B A)[row, group]``. That is a zero point of ``zero - (B A) / scale``, so that what was
trained goes into the file that was there, with its format and its size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from quantkit.schemes import IntScheme, QuantizedWeight, Scheme
from quantkit.schemes.grids import Grids


def can_adapt(scheme: Scheme) -> bool:
    """Whether a scheme has a float zero point for every group of neighbouring columns of a row."""
    return isinstance(scheme, IntScheme) and scheme.zeros == "float" and scheme.axis == 1


@dataclass(slots=True)
class GroupAdapter:
    """A quantized weight with a low-rank term on its groups; made by :meth:`of`.

    Attributes:
        given: what it began as.
        down: ``A``, float32 ``[rank, groups]``; a leaf with gradients.
        up: ``B`` in units of the root mean square of the scales, float32 ``[out_features, rank]``, 0 at the start.
    """

    given: QuantizedWeight
    down: torch.Tensor
    up: torch.Tensor
    _grids: Grids = field(init=False)
    _unit: torch.Tensor = field(init=False)
    _order: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._grids = self.given.scheme.grids()
        self._unit = self.given.scales.float().square().mean().sqrt()
        if "g_idx" in self.given.parts:
            self._order = self.given.parts["g_idx"].argsort(stable=True)

    @classmethod
    def of(cls, weight: QuantizedWeight, rank: int, seed: int = 0) -> GroupAdapter:
        """A weight on the device on which it is trained; the term is zero at the start.

        Args:
            weight: its scheme must pass :func:`can_adapt`.
            rank: at least 1; no more than there are groups says more.
            seed: of the numbers in ``down``.

        Raises:
            ValueError: it has no float zero points.
        """
        if not can_adapt(weight.scheme):
            raise ValueError(f"{weight.scheme.describe()} has no float zero points to merge a term into")
        rows, groups = weight.scales.shape
        rank = min(rank, groups)
        drawn = torch.randn(rank, groups, generator=torch.Generator().manual_seed(seed)) * rank**-0.5
        device = weight.scales.device
        return cls(
            weight, drawn.to(device).requires_grad_(), torch.zeros(rows, rank, device=device, requires_grad=True)
        )

    def parameters(self) -> dict[str, torch.Tensor]:
        """The leaves that are trained, by name."""
        return {"down": self.down, "up": self.up}

    def term(self) -> torch.Tensor:
        """What is added to every weight of a group, float32 ``[out_features, groups]``."""
        return (self.up @ self.down) * self._unit

    def weight(self) -> torch.Tensor:
        """What it stands for now, float32 ``[out_features, in_features]``, with a graph back to the parameters."""
        base, codes = self.given.dequantize(torch.float32), self.given.codes
        spread = self.term().unsqueeze(-1).expand(*self.given.scales.shape, codes.shape[1] // self.down.shape[1])
        added = self._grids.ungrouped(spread, codes.shape)
        return base + (added if self._order is None else added[:, self._order.argsort()])

    def clamp_(self) -> None:
        """Any term can be merged."""

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """The weight with the term merged into its zero points, which are rounded to the dtype of the scales.

        Raises:
            QuantizationError: they reach beyond what it holds.
        """
        given = self.given
        scales = given.scales.float()
        zeros = given.zeros.float() - self.term() / scales
        grid = self._grids.stored(scales, zeros, given.scales.dtype)
        return replace(given, zeros=self._grids.stored_zeros(grid))
