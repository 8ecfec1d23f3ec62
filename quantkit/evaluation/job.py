"""What is to be scored, in a form that travels to another process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit.evaluation.task_files import read_task
from quantkit.recipe import EvaluationSpec
from quantkit.system.memory_bounds import NO_BOUNDS, MemoryBounds

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and how much there is."""

LOGPROBS = "logprobs"
"""Folder of the float model's log-probabilities, in that of its stage."""
POSITIONS = "positions.safetensors"
"""The figures of every position, of a stage from which a later round goes on."""
COMPARING_METRICS = frozenset({"kl_divergence", "top1_agreement"})
"""Metrics that need the float model's log-probabilities."""


def compute_dtype(asked: str, device: str, *, served: bool = False) -> str | None:
    """The dtype in which a model is run; None is the checkpoint's own.

    Args:
        asked: of a recipe; ``auto`` is float32 on a CPU, and on CUDA the checkpoint's own.
        device: ``cpu`` or ``cuda``.
        served: by a runtime of another interpreter, which chooses by itself.
    """
    if asked != "auto":
        return asked
    return "float32" if device == "cpu" and not served else None


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """One checkpoint to score.

    Attributes:
        checkpoint: folder with ``config.json``, safetensors files and the tokenizer.
        spec: texts, window length, metrics, device and dtype.
        reference: folder of the float model's log-probabilities; None where no metric needs them.
        writes_reference: this is the float model, and ``reference`` is written instead of read.
        trust_remote_code: run Python code that comes with the checkpoint, a task or a metric.
        answers_file: where the answers to the spec's questions are written; None keeps none of them.
        float_answers: those of the float model, to compare with.
        float_samples: of the float model, ``items`` of :func:`quantkit.evaluation.samples.samples`, to set beside; None
            if this is the float model, or it wrote none.
        seen: the questions that the model was calibrated on, as :func:`quantkit.evaluation.answers.asked` has them.
        bounds: what the process may take of each device.
        scratch: a folder for what does not fit into the memory while the job is at work; None for the system's own.
        reach: tokens of each text that are scored; the spec's ``max_tokens`` of those that are not named.
        positions: folder for the figures of every position, from which a later job can go on; None keeps none of them.
        known: folder of a finished stage with figures, and a reference, of the first windows, which are not read again.
    """

    checkpoint: Path
    spec: EvaluationSpec
    reference: Path | None = None
    writes_reference: bool = False
    trust_remote_code: bool = False
    answers_file: Path | None = None
    float_answers: Path | None = None
    float_samples: Sequence[Mapping[str, Any]] | None = None
    seen: tuple[str, ...] = ()
    bounds: MemoryBounds = NO_BOUNDS
    scratch: Path | None = None
    reach: Mapping[str, int] = field(default_factory=dict)
    positions: Path | None = None
    known: Path | None = None

    @property
    def compares(self) -> bool:
        """Whether the job compares with the float model's log-probabilities."""
        return not self.writes_reference and bool(COMPARING_METRICS & set(self.spec.metrics))

    @property
    def known_reference(self) -> Path | None:
        """The float model's log-probabilities of windows that it has read, where it is that model that goes on."""
        return None if self.known is None or not self.writes_reference else self.known / LOGPROBS

    @property
    def is_served(self) -> bool:
        """Whether a runtime of another interpreter loads the checkpoint, which it never does for the baseline."""
        return not self.writes_reference and self.spec.is_served

    @property
    def is_local(self) -> bool:
        """Whether nothing of the job comes from the network."""
        answers = self.spec.answers
        fetched = [text.dataset for text in self.spec.texts] + ([answers.dataset] if answers else [])
        local = all(task.file and read_task(Path(task.file)).is_local for task in self.spec.tasks)
        return not self.trust_remote_code and local and not any(fetched)

    def to_json(self) -> dict[str, Any]:
        """The job as JSON data."""
        return {
            "checkpoint": str(self.checkpoint),
            "spec": self.spec.model_dump(mode="json"),
            "reference": None if self.reference is None else str(self.reference),
            "writes_reference": self.writes_reference,
            "trust_remote_code": self.trust_remote_code,
            "answers_file": None if self.answers_file is None else str(self.answers_file),
            "float_answers": None if self.float_answers is None else str(self.float_answers),
            "float_samples": None if self.float_samples is None else [dict(each) for each in self.float_samples],
            "seen": list(self.seen),
            "bounds": self.bounds.to_json(),
            "scratch": None if self.scratch is None else str(self.scratch),
            "reach": dict(self.reach),
            "positions": None if self.positions is None else str(self.positions),
            "known": None if self.known is None else str(self.known),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvaluationJob:
        """The inverse of :meth:`to_json`."""
        return cls(
            checkpoint=Path(data["checkpoint"]),
            spec=EvaluationSpec.model_validate(data["spec"]),
            reference=None if data["reference"] is None else Path(data["reference"]),
            writes_reference=data["writes_reference"],
            trust_remote_code=data["trust_remote_code"],
            answers_file=None if data["answers_file"] is None else Path(data["answers_file"]),
            float_answers=None if data["float_answers"] is None else Path(data["float_answers"]),
            float_samples=data["float_samples"],
            seen=tuple(data["seen"]),
            bounds=MemoryBounds.from_json(data["bounds"]),
            scratch=None if data["scratch"] is None else Path(data["scratch"]),
            reach=data["reach"],
            positions=None if data["positions"] is None else Path(data["positions"]),
            known=None if data["known"] is None else Path(data["known"]),
        )
