"""What the float model says of every token of the rows, to be matched by another model.

Its hidden states before the head, and on request between some of its blocks, are computed once, block by block for some
rows together, and kept on disk. Its logits are made of them anew, of some tokens at a time: they are a hundred times as
many numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.batches import Batch, make_batches
from quantkit.engine.causality import can_be_padded
from quantkit.engine.reverse import ReverseWalk
from quantkit.engine.skeleton import Skeleton
from quantkit.system.artifacts import translated_os_errors
from quantkit.transforms.base import Changes

TOGETHER = 1 << 15
"""Tokens that go through the float model together."""
POINTS = 8
"""Of how many segments what they give is kept, at most; they lie evenly, up to the last."""
ALIKE = 0.85
"""How long a row is at least, of the longest of its batch: padding costs what tokens do."""
HEAD, BETWEEN = "head", "|"
"""Stands for what the head is given where a segment's index may stand; and what stands behind the place of a row."""


@dataclass(slots=True)
class Targets:
    """The float model's part of a training; a context manager.

    Args:
        skeleton: the float model.
        reader: its weights.
        rows: token ids.
        folder: where hidden states are kept; those that an earlier run left there are its own, for the same rows.
        device: where it is computed.
        dtype: in which.
        changes: what transforms made of the whole float model before it was quantized.
        between: keep what some blocks give, too.

    Attributes:
        may_pad: rows of different length may share a batch.
        points: the indexes of segments of which it is known what they give; known when all is prepared.
    """

    skeleton: Skeleton
    reader: CheckpointReader
    rows: Sequence[Sequence[int]]
    folder: Path
    device: torch.device
    dtype: torch.dtype
    changes: Changes = field(default_factory=Changes)
    between: bool = False
    may_pad: bool = field(init=False, default=False)
    points: frozenset[int] = field(init=False, default=frozenset())
    _walk: ReverseWalk = field(init=False)
    _ends: ExitStack = field(init=False, default_factory=ExitStack)
    _files: dict[int, Path] = field(init=False, default_factory=dict)

    def __enter__(self) -> Targets:
        """Load what is around the blocks, and the head.

        Raises:
            CheckpointError: a tensor is missing, of the wrong shape, or not finite.
        """
        differ = len(set(map(len, self.rows))) > 1 and not self.skeleton.has_routed_layers()
        self.may_pad = differ and can_be_padded(self.skeleton, self.reader, self.device, self.dtype)
        self._walk = self._ends.enter_context(ReverseWalk(self.skeleton, self.reader, self.device, self.dtype))
        if self.skeleton.head is not None:
            self.skeleton.load(self.skeleton.head, self.reader, self.device, self.dtype)
            self._ends.callback(self.skeleton.unload, self.skeleton.head)
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of it."""
        self._ends.close()

    def batches(self, places: Sequence[int]) -> list[Batch]:
        """Batches of some of the rows, by the places of these among all; rows of about one length share one."""
        groups: list[list[int]] = []
        for place in sorted(places, key=lambda each: -len(self.rows[each])):
            if not groups or len(self.rows[place]) < ALIKE * len(self.rows[groups[-1][0]]):
                groups.append([])
            groups[-1].append(place)
        return [
            _placed(batch, group)
            for group in groups
            for batch in make_batches([self.rows[place] for place in group], self.device, self.may_pad)
        ]

    def prepare(self, on_rows: Callable[[int, int], None]) -> None:
        """Compute the hidden states of all rows that are not there.

        Args:
            on_rows: called with the number of rows that are done, and of all.

        Raises:
            QuantizationError: the model's code fails on them.
            OutputError: the disk is full.
        """
        for places in self._parts():
            file = self.folder / f"targets-{places[0]}.safetensors"
            if not file.exists():
                self._compute(places, file)
            self._files |= dict.fromkeys(places, file)
            on_rows(len(self._files), len(self.rows))
        with safe_open(self._files[0], "pt") as stored:
            names = list(stored.keys())
        self.points = frozenset(int(end) for _, _, end in (name.partition(BETWEEN) for name in names) if end != HEAD)

    def _parts(self) -> list[list[int]]:
        """Rows that are computed together."""
        found: list[list[int]] = []
        tokens = 0
        for place, row in enumerate(self.rows):
            if not found or tokens + len(row) > TOGETHER:
                found.append([])
                tokens = 0
            found[-1].append(place)
            tokens += len(row)
        return found

    def _compute(self, places: Sequence[int], file: Path) -> None:
        points = set(points_of(len(self.skeleton.segments))) if self.between else set()
        found = _Outputs(self._walk, points)
        batches = self.batches(places)
        for batch, hidden in zip(batches, self._walk.hidden(batches), strict=True):
            found.keep(batch, hidden, HEAD)
        tensors = found.tensors()
        part = file.with_suffix(".part")
        with translated_os_errors(file):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part)
            part.rename(file)

    def hidden(self, batch: Batch, point: int | str = HEAD) -> torch.Tensor:
        """What the head is given of each token of a batch, ``[tokens, width]``, padding left out.

        Args:
            batch: made by :meth:`batches`.
            point: one of :attr:`points`, for what that segment gives, as the transforms turned it.
        """
        found = []
        for place in batch.rows:
            with safe_open(self._files[place], "pt") as stored:
                found.append(stored.get_tensor(_name(place, point)))
        states = torch.cat(found).to(self.device)
        return states if point == HEAD or not self.changes.parts else self.changes.hidden(states.float())

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of every next token, float32 ``[tokens, vocabulary]``, from what the head is given."""
        with torch.no_grad():
            return self._walk.logits(hidden).float().log_softmax(-1)


def _placed(batch: Batch, places: Sequence[int]) -> Batch:
    """A batch that knows its rows by their places among all."""
    return replace(batch, rows=tuple(places[each] for each in batch.rows))


@dataclass(slots=True)
class _Outputs:
    """What segments give while batches go through a walk.

    Args:
        walk: it tells them.
        points: the indexes of the segments that are looked at; those that give no hidden states, or are run several
            times for a batch, go from among them.
    """

    walk: ReverseWalk
    points: set[int]
    _kept: dict[str, torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.walk.on_output = self._see

    def _see(self, index: int, output: torch.Tensor) -> None:
        batch = self.walk.batch
        if batch is None or index not in self.points:
            return
        if output.shape[:-1] != batch.token_ids.shape or _name(batch.rows[0], index) in self._kept:
            self.points.remove(index)
            return
        self.keep(batch, batch.tokens_of(output.flatten(0, 1))[0], index)

    def keep(self, batch: Batch, states: torch.Tensor, point: int | str) -> None:
        """Keep hidden states ``[tokens, width]`` of a batch."""
        for place, own in zip(batch.rows, torch.split(states, list(batch.row_lengths())), strict=True):
            self._kept[_name(place, point)] = own.to("cpu", copy=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that was kept, by row and point."""
        ends = {HEAD, *map(str, self.points)}
        return {name: each for name, each in self._kept.items() if name.partition(BETWEEN)[2] in ends}


def _name(place: int, point: int | str) -> str:
    """Of what is kept of a row."""
    return f"{place}{BETWEEN}{point}"


def points_of(segments: int) -> frozenset[int]:
    """The indexes of the segments of which it is kept what they give, of so many."""
    count = min(segments, POINTS)
    return frozenset(-(-number * segments // count) - 1 for number in range(1, count + 1))
