"""Low-rank terms trained on frozen codes, towards what the float model says of every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.low_rank_terms import Term
from quantkit.engine.segment import Segment
from quantkit.engine.skeleton import Skeleton
from quantkit.exports.base import Export
from quantkit.numerics.low_rank import LowRank
from quantkit.recovery.parts import Part
from quantkit.recovery.schedule import Schedule
from quantkit.recovery.student import StudentWeights
from quantkit.recovery.targets import Targets
from quantkit.recovery.training import Trained, Training
from quantkit.system.progress import Observer
from quantkit.transforms.base import Changes

KIND = "terms"
"""The kind of the leaves of low-rank terms, for which there is a learning rate."""
BETWEEN = "|"
"""Between the name of a part and that of a piece of it, in the file of a training."""


@dataclass(frozen=True, slots=True)
class TrainedTerm:
    """A layer with frozen codes and a term that is trained.

    Attributes:
        name: path of the layer in the model.
        parameter: of the segment's module, that is its weight.
        packed: decodes the layer, float32 ``[out_features, in_features]``.
        start: the term that it begins with.
        dtype: in which the term is stored.
        down: the first matrix, in units of its root mean square at the start; a leaf.
        up: the second, likewise.
    """

    name: str
    parameter: str
    packed: Callable[[], torch.Tensor]
    start: LowRank
    dtype: torch.dtype
    down: torch.Tensor
    up: torch.Tensor

    @classmethod
    def of(
        cls, name: str, parameter: str, packed: Callable[[], torch.Tensor], start: LowRank, dtype: torch.dtype
    ) -> TrainedTerm:
        """A term on the device on which it is trained."""
        leaves = [(each / _unit(each)).requires_grad_() for each in (start.down, start.up)]
        return cls(name, parameter, packed, start, dtype, *leaves)

    def _term(self) -> LowRank:
        return LowRank(self.down * _unit(self.start.down), self.up * _unit(self.start.up))

    def leaves(self) -> dict[str, tuple[str, torch.Tensor]]:
        """Both matrices."""
        return {"down": (KIND, self.down), "up": (KIND, self.up)}

    def given(self) -> dict[str, torch.Tensor]:
        """The weight with the term that it began with."""
        return {self.parameter: self.packed() + self.start.product()}

    def standing_in(self) -> dict[str, torch.Tensor]:
        """The weight with the term as it is."""
        return {self.parameter: self.packed() + self._term().product()}

    def rounded(self) -> dict[str, torch.Tensor]:
        """The same, with the term as it is stored."""
        stored = self.stored()
        return {self.parameter: self.packed() + stored["up"].float() @ stored["down"].float()}

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        """Both matrices in the dtype in which they are stored."""
        term = self._term()
        return {"down": term.down.to(self.dtype), "up": term.up.to(self.dtype)}

    def clamp_(self) -> None:
        """A term may be anything."""


def _unit(matrix: torch.Tensor) -> torch.Tensor:
    """Its root mean square; 1 where it is zero."""
    found = matrix.square().mean().sqrt()
    return torch.where(found > 0, found, 1.0)


def train_terms(
    terms: Sequence[Term],
    export: Export,
    skeleton: Skeleton,
    original: tuple[Skeleton, CheckpointReader, Changes],
    rows: Sequence[Sequence[int]],
    schedule: Schedule,
    folder: Path,
    observer: Observer,
    *,
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> tuple[list[Term], Trained]:
    """Train terms, from the beginning or from where an earlier run was.

    Args:
        terms: those that it begins with.
        export: the quantized checkpoint.
        skeleton: of its model.
        original: the float model, its weights, and what transforms made of the whole of it.
        rows: token ids to train on.
        schedule: how.
        folder: where the state is kept; what an earlier run of the same left there is its own.
        observer: is told what happens.
        device: where it is computed.
        dtypes: of the passes, and of what is stored.

    Returns:
        The best terms, and what came of it.

    Raises:
        QuantizationError: there are too few rows, or the model's code fails on them.
        OutputError: the state cannot be written.
        Terminated: somebody asked to stop; the next run goes on.
    """
    names = {term.layer.name for term in terms}
    decoded = StudentWeights(export, set())
    parts: dict[str, list[Part]] = {}
    for term in terms:
        prefix = next(each.prefix for each in _segments(skeleton) if term.layer in each.layers)
        inside = term.layer.path.removeprefix(prefix).removeprefix(".")
        packed = partial(_packed, decoded, term.layer.name, device)
        start = LowRank(term.low_rank.down.to(device), term.low_rank.up.to(device))
        part = TrainedTerm.of(term.layer.path, f"{inside}.weight".removeprefix("."), packed, start, dtypes[1])
        parts.setdefault(prefix, []).append(part)
    with ExitStack() as ends:
        floats, weights, changes = original
        between = schedule.hidden > 0
        targets = ends.enter_context(Targets(floats, weights, rows, folder, device, dtypes[0], changes, between))
        targets.prepare(partial(observer.progress, "row of the float model"))
        on_step = partial(observer.progress, "step")
        student = StudentWeights(export, names)
        trained = Training(skeleton, student, parts, targets, schedule, folder, on_step).run()
    return (list(terms) if trained.best is None else _with_best(terms, trained.best)), trained


def _segments(skeleton: Skeleton) -> list[Segment]:
    return [*skeleton.segments, *([skeleton.head] if skeleton.head else [])]


def _packed(decoded: StudentWeights, layer: str, device: torch.device) -> torch.Tensor:
    return decoded.read(f"{layer}.weight").to(device, torch.float32)


def _with_best(terms: Sequence[Term], file: Path) -> list[Term]:
    found: Mapping[str, torch.Tensor] = load_file(file)

    def low_rank(path: str) -> LowRank:
        down, up = (found[f"{path}{BETWEEN}{piece}"].float() for piece in ("down", "up"))
        return LowRank(down, up)

    return [replace(term, low_rank=low_rank(term.layer.path)) for term in terms]
