"""Solved layers on their way to a checkpoint, packed and on disk as soon as a segment is done.

What a run that was cut short left here is taken up: a walk asks which segments are finished, and with quantized inputs
for their weights as the method returned them. These are unpacked from what is stored, or lie beside it where the format
could not hold them exactly.

A segment is written by a thread while the next is solved, and no more than one is on its way. What goes wrong there is
raised when the next one is handed over, or at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.tasks import MODEL, LayerResult, SavedChange, Tuned
from quantkit.exports.content import same_values
from quantkit.exports.layer_store import LayerStore, write_layers
from quantkit.formats.base import Format
from quantkit.quantization.segments import SavedSegment, save_segment
from quantkit.schemes import QuantizedWeight, Scheme
from quantkit.schemes.rounding import INPUT_SCALE

EXACT = "exact."
"""Before the suffix of a tensor that holds a layer as the method returned it."""
EXACT_PARTS = ("g_idx", INPUT_SCALE)
"""The parts of a weight that it has beside codes, scales and zero points there."""
TRANSFORM = "transform"
"""Before the place of a transform, and the name of a tensor that it needs to be restored."""
TUNED = "tuned in"
"""Before the prefix of a segment, and the name of a float parameter that tuning changed."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is kept of a layer once its codes are on disk."""

    name: str
    scheme: str
    tokens: int
    error_before: float
    error_after: float
    notes: tuple[str, ...]
    experts: str = ""
    correction: float | None = None
    nats: float | None = None
    effective_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class _Taken:
    """A layer of the segment that is being solved; its errors stay on the device until the segment is done."""

    name: str
    scheme: str
    tokens: int
    before: torch.Tensor
    after: torch.Tensor
    notes: tuple[str, ...]
    experts: str
    correction: float | None
    nats: torch.Tensor | None
    effective_tokens: int | None


@dataclass(frozen=True, slots=True)
class Saved:
    """What is saved of a variant, for a process that reads it while another one writes on; see :class:`SolvedLayers`.

    Attributes:
        segments: that are whole on disk.
    """

    folder: Path
    store: Format
    schemes: Mapping[str, Scheme]
    embedding: str | None
    replays: bool
    segments: Sequence[SavedSegment]

    def layers(self) -> SolvedLayers:
        """The layers that are there."""
        found = SolvedLayers(self.folder, self.store, self.schemes, self.embedding, replays=self.replays)
        found.take_up(self.segments)
        return found


class SolvedLayers(LayerStore):
    """A layer store for the layers of a variant as a walk solves them.

    See :class:`quantkit.engine.tasks.Sink` and :class:`quantkit.engine.tasks.Memory`.

    Args:
        folder: where segments go.
        store: the format that packs layers.
        schemes: of the layers.
        embedding: full name of the input embedding if it is quantized.
        replays: a later walk will ask for weights and what transforms did, as one with quantized inputs does.
        guard: called before a segment is saved; it raises where another process has taken over.

    Attributes:
        seconds_before: what the segments took that earlier runs solved: the variant's own work, and what was shared.
        batch_tokens: tokens of a batch at most, in the walks that solved the segments, each number once.
    """

    def __init__(
        self,
        folder: Path,
        store: Format,
        schemes: Mapping[str, Scheme],
        embedding: str | None = None,
        *,
        replays: bool = False,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(folder, store, embedding)
        self._schemes = schemes
        self._replays = replays
        self._guard = guard
        self._saved: list[SavedSegment] = []
        self._facts: list[_Facts] = []
        self._taken: list[_Taken] = []
        self._finished: set[str] = set()
        self._changes: dict[str, Sequence[SavedChange | None]] = {}
        self._tuning: dict[str, dict[str, Any]] = {}
        self._seconds = (0.0, 0.0)
        self._stored_before = 0
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[SavedSegment] | None = None
        self._batch_tokens: int | None = None
        self.seconds_before = (0.0, 0.0)
        self.batch_tokens: list[int] = []

    # A walk gives what it solves.

    def begin_walk(self, batch_tokens: int | None) -> None:
        """Let go of the segment at which an earlier walk stood, and note how the next one sums its statistics.

        Args:
            batch_tokens: of a batch at most; None where nothing is summed.

        Raises:
            OutputError: what that walk solved last could not be written.
        """
        self.settle()
        self._replaced.difference_update(self._waiting)
        self._tuning = {prefix: told for prefix, told in self._tuning.items() if prefix in self._finished}
        self._let_go()
        self.stored_bytes = self._stored_before
        self._batch_tokens = batch_tokens

    def take(self, result: LayerResult) -> None:
        """Pack a solved layer."""
        kept = self._pack(result.name, result.weight)
        scheme = kept.scheme.describe()
        errors = result.error_before, result.error
        taken = _Taken(
            result.name,
            scheme,
            result.tokens,
            *errors,
            result.notes,
            result.experts,
            result.correction,
            result.nats,
            result.effective_tokens,
        )
        self._taken.append(taken)

    def _pack(self, layer: str, given: QuantizedWeight) -> QuantizedWeight:
        """Pack a layer, and keep what the format cannot hold of it where a later walk will ask; returns what it can."""
        kept = self.keep(layer, given)
        parts = {"codes": given.codes, "scales": given.scales, "zeros": given.zeros}
        parts |= {name: given.parts[name] for name in EXACT_PARTS if name in given.parts}
        exact = {f"{layer}.{EXACT}{part}": tensor for part, tensor in parts.items()}
        for name in exact:
            self._waiting.pop(name, None)
        if self._replays and kept is not given and not same_values(kept, given):
            self._waiting |= {name: tensor.cpu() for name, tensor in exact.items()}
        return kept

    def tuned(self, prefix: str, done: Tuned) -> None:
        """Pack the layers anew that tuning changed, and keep the floats that a later walk will ask for."""
        stored = self.stored_bytes
        for layer, weight in done.weights.items():
            self._pack(layer, weight)
        self.stored_bytes = stored  # the same layers in the same schemes
        if self._replays:
            start = _floats_of(prefix)
            self._waiting |= {f"{start}{name}": value.cpu() for name, value in done.floats.items()}
        told = {"before": done.before, "after": done.after, "steps": done.steps, "paid": done.paid, "note": done.note}
        self._tuning[prefix] = told

    def segment_done(self, prefix: str) -> None:
        """Have what was packed since the last segment written, while the walk goes on with the next.

        Raises:
            OutputError: the segment before could not be written, or the disk is full.
        """
        self._guard()
        facts = _asked(self._taken)
        layers = [each.name for each in self._taken]
        changes = self._changes.get(prefix, ())
        record: dict[str, Any] = {
            "layers": [asdict(each) for each in facts],
            "tensors": {layer: self._tensors[layer] for layer in layers},
            "replaced": [name for name in self._waiting if name in self._replaced],
            "stored_bytes": self.stored_bytes - self._stored_before,
            "changes": {place: self.transformed(place) for place in (MODEL, prefix)},
            "tuning": self._tuning.get(prefix),
            "seconds": self._seconds,
            "batch_tokens": self._batch_tokens,
        }
        if self._replays:
            for place, change in enumerate(changes):
                tensors = {} if change is None else change.tensors
                start = _start_of(prefix, place)
                self._waiting |= {f"{start}{name}": each.cpu() for name, each in tensors.items()}
        write = partial(_write, tensors=self._waiting, layers=self._weighed)
        self.settle()
        self._written = self._writer.submit(save_segment, self._folder / prefix, write, record)
        self._finished.add(prefix)
        self._stored_before = self.stored_bytes
        self._let_go()

    def settle(self) -> None:
        """Wait until what was handed over is on disk.

        Raises:
            OutputError: it could not be written, or the disk is full.
        """
        written, self._written = self._written, None
        if written is not None:
            self._know(written.result())

    def close(self) -> None:
        """Wait for what is being written, and end its thread. If that fails, the segment is not there: no more."""
        self._writer.shutdown()

    def _let_go(self) -> None:
        """Forget the segment at which the walk stands."""
        self._taken, self._waiting, self._weighed = [], {}, {}

    # A walk asks what there is.

    def take_up(self, segments: Sequence[SavedSegment]) -> None:
        """Count segments that an earlier run saved as finished."""
        for segment in segments:
            record = segment.record
            self._tensors |= record["tensors"]
            self._replaced |= set(record["replaced"])
            self.stored_bytes += record["stored_bytes"]
            self.seconds_before = _sum(self.seconds_before, record["seconds"])
            self._know(segment)
        self._stored_before = self.stored_bytes

    def saved(self) -> Saved:
        """What is on disk, of which another process can be told."""
        self.settle()
        return Saved(self._folder, self._store, self._schemes, self._embedding, self._replays, tuple(self._saved))

    def has(self, prefix: str) -> bool:
        """Whether a segment is finished; the last one may still be on its way to the disk."""
        return prefix in self._finished

    def weight(self, layer: str) -> QuantizedWeight:
        """A layer of a finished segment as the method returned it."""
        scheme = self._schemes[layer]
        if f"{layer}.{EXACT}codes" not in self._readers:
            store = self._store_of(layer)
            tensors = {suffix: self.stored(f"{layer}.{suffix}").read() for suffix in store.layer_suffixes(scheme)}
            return store.unpack(tensors, scheme)
        wanted = ("codes", "scales", "zeros", *EXACT_PARTS)
        names = [name for name in wanted if f"{layer}.{EXACT}{name}" in self._readers]
        parts = {name: self.stored(f"{layer}.{EXACT}{name}").read() for name in names}
        return QuantizedWeight(scheme, parts.pop("codes"), parts.pop("scales"), parts.pop("zeros"), parts)

    def changes(self, prefix: str) -> list[SavedChange | None]:
        """What each transform did to a finished segment."""
        found: list[SavedChange | None] = []
        for place, change in enumerate(self._changes[prefix]):
            start = _start_of(prefix, place)
            names = [name for name in self._readers if name.startswith(start)] if change is not None else []
            tensors = {name.removeprefix(start): self.stored(name).read() for name in names}
            found.append(change and SavedChange(tensors, change.data))
        return found

    def floats(self, prefix: str) -> dict[str, torch.Tensor]:
        """The float parameters that tuning changed in a finished segment."""
        start = _floats_of(prefix)
        found = [name for name in self._readers if name.startswith(start)]
        return {name.removeprefix(start): self.stored(name).read() for name in found}

    def remember_changes(self, prefix: str, changes: Sequence[SavedChange | None]) -> None:
        """Keep what each transform did to the segment at which the walk stands, or to the whole model."""
        self._changes[prefix] = changes

    def transformed(self, prefix: str) -> list[Mapping[str, Any] | None]:
        """What each transform did to a segment or the whole model, as JSON."""
        return [None if change is None else change.data for change in self._changes.get(prefix, ())]

    def remember_seconds(self, own: float, shared: float) -> None:
        """Keep what the segment at which the walk stands took."""
        self._seconds = (own, shared)

    # What the checkpoint is made of.

    def tokens(self) -> dict[str, int]:
        """Calibration tokens that reached each layer."""
        return {each.name: each.tokens for each in self._facts}

    def layers(self) -> list[dict[str, Any]]:
        """Scheme, errors and notes of each layer, for the report, and what else was looked at."""
        found = [{**asdict(each), "notes": list(each.notes)} for each in self._facts]
        return [{key: each[key] for key in each if key != "experts" and each[key] is not None} for each in found]

    def tuning(self) -> list[dict[str, Any]]:
        """What tuning did to each segment, in their order: see :class:`quantkit.engine.tasks.Tuned`."""
        return [{"segment": prefix, **told} for prefix, told in self._tuning.items()]

    def experts(self) -> dict[str, dict[str, int]]:
        """By what the names of a layer's experts begin with, the calibration tokens of each of their layers."""
        found: dict[str, dict[str, int]] = {}
        for each in self._facts:
            if each.experts:
                found.setdefault(each.experts, {})[each.name] = each.tokens
        return found

    def _know(self, segment: SavedSegment) -> None:
        """A segment that lies on disk counts as finished."""
        record = segment.record
        self._saved.append(segment)
        reader = CheckpointReader(segment.folder)
        self._readers.update(dict.fromkeys(reader.names(), reader))
        self._digests |= record["digests"]
        self._facts += [_Facts(**{**each, "notes": tuple(each["notes"])}) for each in record["layers"]]
        for place, done in record["changes"].items():
            self._changes[place] = [data if data is None else SavedChange({}, data) for data in done]
        if record["tuning"] is not None:
            self._tuning[segment.folder.name] = record["tuning"]
        self._finished.add(segment.folder.name)
        if record["batch_tokens"] is not None and record["batch_tokens"] not in self.batch_tokens:
            self.batch_tokens.append(record["batch_tokens"])


def _write(folder: Path, tensors: Mapping[str, torch.Tensor], layers: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Write a segment's tensors; see :func:`quantkit.exports.layer_store.write_layers`."""
    return {"digests": write_layers(folder, tensors, layers)}


def _start_of(prefix: str, place: int) -> str:
    """How the names of the tensors of a transform start that is at this place among those of its variant."""
    return f"{TRANSFORM} {place} of {prefix}: "


def _floats_of(prefix: str) -> str:
    """How the names of the float parameters start that tuning changed in a segment."""
    return f"{TUNED} {prefix}: "


def _asked(taken: Sequence[_Taken]) -> list[_Facts]:
    """The facts of the layers of a segment; the device is asked once for all their errors."""
    if not taken:
        return []
    unknown = torch.tensor(float("nan"))
    asked = [(each.before, each.after, unknown if each.nats is None else each.nats) for each in taken]
    numbers = torch.stack([error.to(taken[0].after) for errors in asked for error in errors]).view(-1, 3).tolist()
    return [
        _Facts(
            each.name,
            each.scheme,
            each.tokens,
            before,
            after,
            each.notes,
            each.experts,
            each.correction,
            None if each.nats is None else nats,
            each.effective_tokens,
        )
        for each, (before, after, nats) in zip(taken, numbers, strict=True)
    ]


def _sum(one: tuple[float, float], other: Sequence[float]) -> tuple[float, float]:
    return one[0] + other[0], one[1] + other[1]
