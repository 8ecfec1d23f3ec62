"""What is found of what each choice costs each layer: by the layers that tasks solve, kept as segments are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit.engine.tasks import LayerResult, SavedChange, Tuned
from quantkit.schemes import QuantizedWeight
from quantkit.system.artifacts import fingerprint, mapping_or_nothing, write_json

Costs = dict[str, dict[str, float | None]]
"""By the name of a layer and of a choice, in nats a token; None where nothing is known of the layer."""


@dataclass(slots=True)
class Found:
    """What was found.

    Args:
        part: the file in which it is kept for a run that goes on where this one is cut short.
        asked: what the costs depend on.

    Attributes:
        costs: of layers.
        embeddings: the embedding as each choice has it.
    """

    part: Path
    asked: Mapping[str, Any]
    costs: Costs = field(default_factory=dict)
    embeddings: dict[str, QuantizedWeight] = field(default_factory=dict)
    _done: set[tuple[str, str]] = field(default_factory=set)

    def add(self, layer: str, choice: str, nats: torch.Tensor | None) -> None:
        """What a choice costs a layer."""
        self.costs.setdefault(layer, {})[choice] = None if nats is None else float(nats)

    def segment_done(self, choice: str, prefix: str) -> None:
        """A choice was solved for all layers of a segment."""
        self._done.add((choice, prefix))

    def is_done(self, choice: str, prefix: str) -> bool:
        """Whether it was, in this run or one before."""
        return (choice, prefix) in self._done

    def take_up(self) -> None:
        """Go on with what a run that was cut short has found, if it was asked for the same."""
        found = mapping_or_nothing(self.part)
        if found.get("asked") == fingerprint(dict(self.asked)):
            self.costs = found["costs"]
            self._done = {(choice, prefix) for choice, prefix in found["done"]}

    def keep(self) -> None:
        """Keep what is found so far."""
        write_json(self.part, {"asked": fingerprint(dict(self.asked)), "costs": self.costs, "done": sorted(self._done)})


@dataclass(frozen=True, slots=True)
class Judged:
    """Takes what a choice costs each layer, and remembers which segments are done; codes are let go.

    Args:
        choice: its name.
        embedding: name of the input embedding where it is quantized.
        found: where costs go.
    """

    choice: str
    embedding: str | None
    found: Found

    def take(self, result: LayerResult) -> None:
        """One layer."""
        if result.name == self.embedding:
            self.found.embeddings[self.choice] = result.weight
        else:
            self.found.add(result.name, self.choice, result.nats)

    def replace(self, name: str, tensor: torch.Tensor) -> None:
        """A float tensor that a transform changes; nobody wants it here."""

    def tuned(self, prefix: str, done: Tuned) -> None:
        """What tuning made of a segment; no choice is tuned."""

    def segment_done(self, prefix: str) -> None:
        """All layers of a segment have been given."""
        self.found.segment_done(self.choice, prefix)

    def has(self, prefix: str) -> bool:
        """Whether a segment is finished; an embedding is solved again, as its codes are not kept."""
        embedding = self.embedding
        return self.found.is_done(self.choice, prefix) and not (embedding and embedding.startswith(prefix))

    def weight(self, layer: str) -> QuantizedWeight:
        """Codes of a finished segment: with float inputs nobody asks for them."""
        raise NotImplementedError(f"the codes of {layer} are not kept")

    def changes(self, prefix: str) -> Sequence[SavedChange | None]:
        """No transforms."""
        return ()

    def floats(self, prefix: str) -> Mapping[str, torch.Tensor]:
        """No tuning."""
        return {}

    def remember_changes(self, prefix: str, changes: Sequence[SavedChange | None]) -> None:
        """No transforms."""

    def remember_seconds(self, own: float, shared: float) -> None:
        """Nobody asks."""
