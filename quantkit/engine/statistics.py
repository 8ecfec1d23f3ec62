"""Statistics of a layer's inputs, gathered as the tokens pass; inputs that are not finite are told by their row."""

from __future__ import annotations

from collections.abc import Set
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from quantkit.engine.batches import Batch
from quantkit.engine.precision import bfloat16_products
from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics, Statistic
from quantkit.system.host import decide

CHUNK_TOKENS = 512
"""Tokens multiplied at a time on a CPU: what its caches hold."""
WHOLE_COLUMNS = 768
"""Up to this many columns a CPU multiplies the whole matrix faster than the tiles of its upper triangle."""
MIRRORED = 256
"""Rows and columns of a tile that is mirrored at a time."""


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
        self._weight: torch.Tensor | int = 0
        self.tokens = 0

    def add(self, inputs: torch.Tensor, batch: Batch) -> None:
        """Take in the inputs of one batch, ``[..., in_features]``; those of padding are left out."""
        flat = batch.without_padding(inputs.detach().reshape(-1, inputs.shape[-1]))
        weights = batch.weights_of(flat)
        self.tokens += flat.shape[0]
        self._weight = self._weight + (flat.shape[0] if weights is None else weights.sum())
        self._check.add(flat, batch)
        if Statistic.GRAM in self._needs:
            add_gram(self._sum(Statistic.GRAM, flat, flat.shape[1]), flat, weights)
        if Statistic.ABS_MEAN in self._needs:
            self._sum(Statistic.ABS_MEAN, flat).add_(_weighed(flat.float().abs(), weights).sum(0))
        if Statistic.SQUARE_MEAN in self._needs:
            self._sum(Statistic.SQUARE_MEAN, flat).add_(_weighed(flat.float().square(), weights).sum(0))

    def result(self) -> InputStatistics:
        """The statistics over all tokens, weighed; a layer that no token reached has none.

        Raises:
            QuantizationError: the input is not finite; names the layer and the calibration row.
        """
        if self.tokens == 0:
            return InputStatistics()
        self._check.result()
        weight = self._weight
        divisor = weight if isinstance(weight, int) else weight.clamp(min=torch.finfo(weight.dtype).tiny)
        means = {statistic.value: total.div_(divisor) for statistic, total in self._sums.items()}
        if Statistic.GRAM in self._needs:
            mirror_(means["gram"])
        self._sums = {}
        return InputStatistics(self.tokens, means.get("abs_mean"), means.get("square_mean"), means.get("gram"))

    def _sum(self, statistic: Statistic, like: torch.Tensor, *rows: int) -> torch.Tensor:
        if statistic not in self._sums:
            self._sums[statistic] = torch.zeros(*rows, like.shape[1], device=like.device)
        return self._sums[statistic]


def add_gram(total: torch.Tensor, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
    """Add ``XᵀX``, or with weights ``Xᵀ diag(w) X``, to the upper triangle of ``total``; below it nothing is defined.

    The sums are float32 whatever the inputs are. On CPU only the tiles of the upper triangle are multiplied,
    and inputs that are bfloat16 go through the processor's bfloat16 units without being rounded again; weighed ones,
    which bfloat16 could not hold, do not.

    Args:
        total: float32 ``[in_features, in_features]``.
        inputs: ``[tokens, in_features]``.
        weights: float32 ``[tokens]``, how much each token counts.
    """
    if inputs.device.type != "cpu":
        inputs = inputs.float()
        total.addmm_(_weighed(inputs, weights).T, inputs)
        return
    columns = inputs.shape[1]
    tile = columns if columns <= WHOLE_COLUMNS else -(-columns // 2)
    with bfloat16_products(inputs) if weights is None else nullcontext():
        for first in range(0, len(inputs), CHUNK_TOKENS):
            part = inputs[first : first + CHUNK_TOKENS].float()
            left = _weighed(part, None if weights is None else weights[first : first + CHUNK_TOKENS])
            for start in range(0, columns, tile):
                stop = min(start + tile, columns)
                total[start:stop, start:].addmm_(left[:, start:stop].T, part[:, start:])


def _weighed(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return values if weights is None else values * weights.unsqueeze(1)


def mirror_(matrix: torch.Tensor) -> None:
    """Put the upper triangle of a square matrix below its diagonal too, without a second matrix."""
    for start in range(0, len(matrix), MIRRORED):
        stop = min(start + MIRRORED, len(matrix))
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


@dataclass(slots=True)
class FiniteCheck:
    """Looks at one input of a layer as the batches pass; the device is asked once, when all have.

    Args:
        name: of the layer that reads the input.
    """

    name: str
    _seen: list[tuple[torch.Tensor, Batch]] = field(default_factory=list)

    def add(self, flat: torch.Tensor, batch: Batch) -> None:
        """Look at the inputs of one batch, ``[tokens, in_features]`` without padding."""
        self._seen.append((flat.isfinite().all(1), batch))

    def result(self) -> None:
        """Refuse an input that was not finite.

        Raises:
            QuantizationError: names the layer and the row.
        """
        seen, self._seen = self._seen, []
        if not seen or decide(torch.stack([finite.all() for finite, _ in seen]).all()):
            return
        finite, batch = next(each for each in seen if not decide(each[0].all()))
        raise QuantizationError(
            f"{self.name}: its input is NaN or infinite for {_row(finite, batch)}",
            "the activations of the model overflow: give a model in bfloat16 or float32, or leave out that record",
        )


def _row(finite: torch.Tensor, batch: Batch) -> str:
    """The calibration row of the first token that is not finite, counted from 0."""
    length = batch.token_ids.shape[1]
    positions = torch.arange(batch.token_ids.numel()) if batch.valid is None else batch.valid.cpu()
    if len(finite) != len(positions):  # a layer that is given some tokens only, as an expert is
        return f"one of the calibration rows {', '.join(map(str, sorted(batch.rows)))}"
    first = int(positions[int((~finite).nonzero()[0].item())])
    return f"token {first % length} of calibration row {batch.rows[first // length]}"
