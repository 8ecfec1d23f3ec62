"""Solved layers on their way to a checkpoint: packed and on disk as soon as a segment is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.engine.tasks import LayerResult
from quantkit.exports.spool import Spool
from quantkit.formats.base import Format
from quantkit.numerics.host import number


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is kept of a layer once its codes are on disk; the errors stay on the device until they are asked for."""

    name: str
    scheme: str
    tokens: int
    before: torch.Tensor
    after: torch.Tensor
    notes: tuple[str, ...]


class SolvedLayers(Spool):
    """A spool for the layers of a variant as a walk solves them; see :class:`quantkit.engine.tasks.Sink`."""

    def __init__(self, folder: Path, store: Format, embedding: str | None = None) -> None:
        super().__init__(folder, store, embedding)
        self._facts: list[_Facts] = []

    def take(self, result: LayerResult) -> None:
        """Pack a solved layer."""
        weight = self.keep(result.name, result.weight)
        scheme = weight.scheme.describe()
        self._facts.append(_Facts(result.name, scheme, result.tokens, result.error_before, result.error, result.notes))

    def segment_done(self, prefix: str) -> None:
        """Write what was packed since the last segment.

        Raises:
            OutputError: the folder cannot be written, the disk is full.
        """
        self.flush(prefix)

    def tokens(self) -> dict[str, int]:
        """Calibration tokens that reached each layer."""
        return {each.name: each.tokens for each in self._facts}

    def layers(self) -> list[dict[str, Any]]:
        """Scheme, errors and notes of each layer, for the report; asks the device twice for each."""
        return [
            {
                "name": each.name,
                "scheme": each.scheme,
                "tokens": each.tokens,
                "error_before": number(each.before),
                "error_after": number(each.after),
                "notes": list(each.notes),
            }
            for each in self._facts
        ]
