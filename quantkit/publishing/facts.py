"""What a card says beyond what the checkpoint's own files tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.quantization import Job


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What may be known of a checkpoint beside its files; all of it may be absent.

    Attributes:
        base_model: ``org/name`` of the float model on the hub; not given for a model that is not there.
        revision: its commit.
        source: folder of the float model, whose card or licence file tells the licence and the languages.
        repository: ``org/name`` under which the checkpoint will be found; else its folder's name stands in snippets.
        scores: the figures of the checkpoint as a row of a report has them: ``metrics``, ``size_bytes``, ``loaded_by``.
        baseline: the figures of the float model, likewise.
        calibration: the audit of the calibration set.
    """

    base_model: str | None = None
    revision: str | None = None
    source: Path | None = None
    repository: str | None = None
    scores: Mapping[str, Any] | None = None
    baseline: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, job: Job, repository: str | None = None) -> CardFacts:
        """What may be said of the model that a checkpoint was made of."""
        name, revision = job.hub or (None, None)
        return cls(base_model=name, revision=revision, source=job.source, repository=repository)
