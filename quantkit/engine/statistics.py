"""Statistics of a layer's inputs, gathered as the tokens pass."""

from __future__ import annotations

from collections.abc import Set

import torch

from quantkit.engine.batches import Batch
from quantkit.engine.finite import FiniteCheck
from quantkit.engine.precision import bfloat16_products
from quantkit.methods.base import InputStatistics, Statistic

CHUNK_TOKENS = 512
"""Tokens multiplied at a time on a CPU: what its caches hold."""
WHOLE_COLUMNS = 768
"""Up to this many columns a CPU multiplies the whole matrix faster than the tiles of its upper triangle."""


class Gatherer:
    """Accumulates what the methods of a walk ask to know of one input.

    Args:
        needs: the union of their statistics.
        name: of the layer that reads the input, for messages.
    """

    def __init__(self, needs: Set[Statistic], name: str = "") -> None:
        self._needs = needs
        self._check = FiniteCheck(name)
        self._sums: dict[Statistic, torch.Tensor] = {}
        self.tokens = 0

    def add(self, inputs: torch.Tensor, batch: Batch) -> None:
        """Take in the inputs of one batch, ``[..., in_features]``; those of padding are left out."""
        flat = batch.without_padding(inputs.detach().reshape(-1, inputs.shape[-1]))
        self.tokens += flat.shape[0]
        self._check.add(flat, batch)
        if Statistic.GRAM in self._needs:
            add_gram(self._sum(Statistic.GRAM, flat, flat.shape[1]), flat)
        if Statistic.ABS_MEAN in self._needs:
            self._sum(Statistic.ABS_MEAN, flat).add_(flat.float().abs().sum(0))
        if Statistic.SQUARE_MEAN in self._needs:
            self._sum(Statistic.SQUARE_MEAN, flat).add_(flat.float().square().sum(0))

    def result(self) -> InputStatistics:
        """The statistics over all tokens; a layer that no token reached has none.

        Raises:
            QuantizationError: the input is not finite; names the layer and the calibration row.
        """
        if self.tokens == 0:
            return InputStatistics()
        self._check.result()
        means = {statistic.value: total.div_(self.tokens) for statistic, total in self._sums.items()}
        if Statistic.GRAM in self._needs:
            means["gram"] = means["gram"].triu() + means["gram"].triu(1).T
        self._sums = {}
        return InputStatistics(self.tokens, means.get("abs_mean"), means.get("square_mean"), means.get("gram"))

    def _sum(self, statistic: Statistic, like: torch.Tensor, *rows: int) -> torch.Tensor:
        if statistic not in self._sums:
            self._sums[statistic] = torch.zeros(*rows, like.shape[1], device=like.device)
        return self._sums[statistic]


def add_gram(total: torch.Tensor, inputs: torch.Tensor) -> None:
    """Add ``XᵀX`` to the upper triangle of ``total``; what lies below it is left undefined.

    The sums are float32 whatever the inputs are. On CPU only the tiles of the upper triangle are multiplied,
    and inputs that are bfloat16 go through the processor's bfloat16 units without being rounded again.

    Args:
        total: float32 ``[in_features, in_features]``.
        inputs: ``[tokens, in_features]``.
    """
    if inputs.device.type != "cpu":
        inputs = inputs.float()
        total.addmm_(inputs.T, inputs)
        return
    columns = inputs.shape[1]
    tile = columns if columns <= WHOLE_COLUMNS else -(-columns // 2)
    with bfloat16_products(inputs):
        for part in torch.split(inputs, CHUNK_TOKENS):
            part = part.float()
            for start in range(0, columns, tile):
                stop = min(start + tile, columns)
                total[start:stop, start:].addmm_(part[:, start:stop].T, part[:, start:])
