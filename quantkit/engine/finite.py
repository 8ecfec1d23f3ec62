"""Activations that are not finite, and the calibration row in which they first are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from quantkit.engine.batches import Batch
from quantkit.errors import QuantizationError
from quantkit.system.host import decide


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
