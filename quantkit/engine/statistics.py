"""Statistics of a layer's inputs, gathered as the tokens pass."""

from __future__ import annotations

from collections.abc import Set

import torch

from quantkit.engine.precision import fast_products
from quantkit.methods.base import InputStatistics, Statistic

FLUSH_TOKENS = 4096
"""Inputs are collected up to this many tokens before they are multiplied: one large product is cheaper."""


class Gatherer:
    """Accumulates what the methods of a walk ask to know of one input.

    Args:
        needs: the union of their statistics.
    """

    def __init__(self, needs: Set[Statistic]) -> None:
        self._needs = needs
        self._waiting: list[torch.Tensor] = []
        self._waiting_tokens = 0
        self._sums: dict[Statistic, torch.Tensor] = {}
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Take in the inputs of one batch, ``[..., in_features]``."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1])
        self._waiting.append(flat)
        self._waiting_tokens += flat.shape[0]
        self.tokens += flat.shape[0]
        if self._waiting_tokens >= FLUSH_TOKENS:
            self._flush()

    def result(self) -> InputStatistics:
        """The statistics over all tokens; a layer that no token reached has none."""
        if self.tokens == 0:
            return InputStatistics()
        self._flush()
        means = {statistic.value: total.div_(self.tokens) for statistic, total in self._sums.items()}
        self._sums = {}
        return InputStatistics(tokens=self.tokens, **means)

    def _flush(self) -> None:
        if not self._waiting:
            return
        inputs = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        self._waiting, self._waiting_tokens = [], 0
        if Statistic.GRAM in self._needs:
            self._accumulate(Statistic.GRAM, gram(inputs))
        inputs = inputs.float()
        if Statistic.ABS_MEAN in self._needs:
            self._accumulate(Statistic.ABS_MEAN, inputs.abs().sum(0))
        if Statistic.SQUARE_MEAN in self._needs:
            self._accumulate(Statistic.SQUARE_MEAN, inputs.square().sum(0))

    def _accumulate(self, statistic: Statistic, part: torch.Tensor) -> None:
        total = self._sums.get(statistic)
        self._sums[statistic] = part if total is None else total.add_(part)


def gram(inputs: torch.Tensor) -> torch.Tensor:
    """``XᵀX`` in float32, ``[in_features, in_features]``, symmetric to the last bit.

    Where products in float32 are slow and plain, only the upper triangle's tiles are multiplied.
    """
    columns = inputs.shape[1]
    if inputs.device.type != "cpu" or fast_products():
        inputs = inputs.float()
        product = inputs.T @ inputs
        return (product + product.T).mul_(0.5)
    product = torch.empty(columns, columns, dtype=torch.float32)
    tile = max(64, -(-columns // 6))
    for start in range(0, columns, tile):
        stop = min(start + tile, columns)
        strip = inputs[:, start:stop].T @ inputs[:, start:]
        product[start:stop, start:] = strip
        product[start:, start:stop] = strip.T
    return product
