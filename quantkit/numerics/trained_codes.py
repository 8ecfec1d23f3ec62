"""A quantized weight whose codes are trained with its scales.

Behind the codes stand latent numbers, in steps of the grid. Their nearest codes are what the weight is made of, and a
gradient goes straight through the rounding (Bengio et al. 2013, arXiv:1308.3432), but not where the grid ends. Scales
and float zero points are trained beside them, as in LSQ (Esser et al. 2020, arXiv:1902.08153) and in the first phase of
EfficientQAT (Chen et al. 2024, arXiv:2407.11062).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from quantkit.numerics.trainable import Trainable
from quantkit.schemes import IntScheme, QuantizedWeight, Scheme


def can_train_codes(scheme: Scheme) -> bool:
    """Whether codes of a scheme can be trained: whether its levels lie one step apart."""
    return isinstance(scheme, IntScheme)


class _Rounded(torch.autograd.Function):
    """Nearest codes as they are decoded, with a gradient that goes straight through the rounding.

    Autograd would keep and pass over every step between them: a weight is read and written a fourth as often so.
    """

    @staticmethod
    def forward(
        context: Any, latents: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, last: int
    ) -> torch.Tensor:
        """The values, float32 ``[out_features, groups, group_size]``.

        Args:
            context: of torch.
            latents: in groups, likewise.
            zeros: float32 ``[out_features, groups]``, in steps of the codes.
            scales: float32, likewise.
            last: the largest code.
        """
        context.save_for_backward(latents, zeros, scales)
        context.last = last
        return latents.clamp(0, last).round_().sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1))

    @staticmethod
    def backward(context: Any, *given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of latents within the grid, of zero points and of scales, as far as they are asked for."""
        latents, zeros, scales = context.saved_tensors
        (gradient,) = given
        wants_latents, wants_zeros, wants_scales, _ = context.needs_input_grad
        of_latents = of_zeros = of_scales = None
        if wants_scales:
            levels = latents.clamp(0, context.last).round_().sub_(zeros.unsqueeze(-1))
            of_scales = levels.mul_(gradient).sum(-1)
        if wants_zeros:
            of_zeros = -gradient.sum(-1) * scales
        if wants_latents:
            outside = latents.clamp(0, context.last).ne(latents)
            of_latents = (gradient * scales.unsqueeze(-1)).masked_fill_(outside, 0.0)
        return of_latents, of_zeros, of_scales, None


@dataclass(slots=True)
class TrainedCodes:
    """A quantized weight with parameters; made by :meth:`of`.

    Attributes:
        trainable: the scales, and the codes that it began with.
        latents: float32, the codes before they are rounded, in groups as the scheme has them; a leaf with gradients.
    """

    trainable: Trainable
    latents: torch.Tensor
    _order: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if "g_idx" in self.trainable.given.parts:
            self._order = self.trainable.given.parts["g_idx"].argsort(stable=True)

    @classmethod
    def of(
        cls, weight: QuantizedWeight, origin: torch.Tensor, *, zeros: bool = True, within: float | None = None
    ) -> TrainedCodes:
        """A weight on the device on which it is trained.

        Args:
            weight: its scheme must pass :func:`can_train_codes`.
            origin: the float weight that it stands for, ``[out_features, in_features]``; the latents are where that
                lies on the grid, a step beyond its ends at most.
            zeros: train float zero points, too, where there are any.
            within: how far from its code a latent begins at most, in steps of the grid; by default anywhere on it.
        """
        found = cls(Trainable.of(weight, zeros=zeros), torch.empty(0))
        scheme, grids = weight.scheme, weight.scheme.grids()
        order = found._order
        groups = grids.grouped((origin if order is None else origin[:, order]).float())
        places = groups / weight.scales.float().unsqueeze(-1) + weight.zeros.float().unsqueeze(-1)
        if within is not None:
            codes = grids.grouped(weight.codes if order is None else weight.codes[:, order]).float()
            places = codes + (places - codes).clamp_(-within, within)
        found.latents = places.clamp_(-1.0, 2.0**scheme.bits).contiguous().requires_grad_()
        return found

    def parameters(self) -> dict[str, torch.Tensor]:
        """The leaves that are trained, by name."""
        return {**self.trainable.parameters(), "latents": self.latents}

    def weight(self) -> torch.Tensor:
        """What it stands for now, float32 ``[out_features, in_features]``, with a graph back to the parameters."""
        given = self.trainable.given
        scales = given.scales.float() * self.trainable.factors
        rounded: Any = _Rounded.apply  # torch gives it no types
        values: torch.Tensor = rounded(self.latents, self._zeros(), scales, 2**given.scheme.bits - 1)
        found = given.scheme.grids().ungrouped(values, given.codes.shape)
        return found if self._order is None else found[:, self._order.argsort()]

    def clamp_(self) -> None:
        """Keep scales within reach of those that they began with, and latents of the grid; after each step."""
        self.trainable.clamp_()
        with torch.no_grad():
            self.latents.clamp_(-1.0, 2.0**self.trainable.given.scheme.bits)

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """The weight with the nearest codes, and scales and zero points rounded to what the scheme stores.

        Raises:
            QuantizationError: they reach beyond what their dtype holds.
        """
        given = self.trainable.given
        last = 2**given.scheme.bits - 1
        codes = given.scheme.grids().ungrouped(self.latents.clamp(0, last).round(), given.codes.shape).to(torch.uint8)
        if self._order is not None:
            codes = codes[:, self._order.argsort()]
        return replace(self.trainable.result(), codes=codes.contiguous())

    def _zeros(self) -> torch.Tensor:
        zeros = self.trainable.given.zeros.float()
        return zeros if self.trainable.shifts is None else zeros + self.trainable.shifts
