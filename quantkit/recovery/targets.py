"""What the float model says of every token of the rows, to be matched by another model.

Its hidden states before the head are computed once, block by block for some rows together, and kept on disk. Its logits
are made of them anew, of some tokens at a time: they are a hundred times as many numbers.
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

TOGETHER = 1 << 15
"""Tokens that go through the float model together."""


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

    Attributes:
        may_pad: rows of different length may share a batch.
    """

    skeleton: Skeleton
    reader: CheckpointReader
    rows: Sequence[Sequence[int]]
    folder: Path
    device: torch.device
    dtype: torch.dtype
    may_pad: bool = field(init=False, default=False)
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
        """Batches of some of the rows, by the places of these among all."""
        found = make_batches([self.rows[place] for place in places], self.device, self.may_pad)
        return [_placed(batch, places) for batch in found]

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
        batches = self.batches(places)
        tensors: dict[str, torch.Tensor] = {}
        for batch, hidden in zip(batches, self._walk.hidden(batches), strict=True):
            lengths = [len(self.rows[place]) for place in batch.rows]
            for place, states in zip(batch.rows, torch.split(hidden, lengths), strict=True):
                tensors[str(place)] = states.cpu().contiguous()
        part = file.with_suffix(".part")
        with translated_os_errors(file):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part)
            part.rename(file)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """What the head is given of each token of a batch, ``[tokens, width]``, padding left out."""
        found = []
        for place in batch.rows:
            with safe_open(self._files[place], "pt") as stored:
                found.append(stored.get_tensor(str(place)))
        return torch.cat(found).to(self.device)

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of every next token, float32 ``[tokens, vocabulary]``, from what the head is given."""
        with torch.no_grad():
            return self._walk.logits(hidden).float().log_softmax(-1)


def _placed(batch: Batch, places: Sequence[int]) -> Batch:
    """A batch that knows its rows by their places among all."""
    return replace(batch, rows=tuple(places[each] for each in batch.rows))
