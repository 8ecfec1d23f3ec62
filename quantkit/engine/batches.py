"""Rows of tokens to batches.

Rows of similar length go into one batch, padded on the right. In a causal model no token sees what is to its
right, so padding needs no mask: it changes nothing but its own activations, which the statistics leave out. Where a
token does, only rows of equal length share a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from quantkit.errors import QuantizationError

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a batch: enough that the products are efficient, few enough that a CPU's cache helps."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that pass through the model together.

    Attributes:
        token_ids: int64 ``[rows, length]``, padded on the right.
        valid: int64 ``[tokens]``, the flat positions that are not padding; None if there is no padding.
        rows: the place of each row among all that were given.
        inputs: further inputs of the model by their names, such as images; of a single row.
        lengths: tokens of each row; empty if there is no padding.
        held_out: whether it is left out of statistics, and errors of solved layers are told by its tokens.
    """

    token_ids: torch.Tensor
    valid: torch.Tensor | None
    rows: tuple[int, ...] = ()
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    held_out: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return self.token_ids.numel() if self.valid is None else len(self.valid)

    def tokens_of(
        self, flat: torch.Tensor, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows of ``[positions, features]`` that belong to tokens, and which tokens these are.

        Args:
            flat: what a layer is given.
            positions: int64, which positions of the batch these are; None for all of them in their order.

        Returns:
            The rows, and the place of each among the tokens of the batch; None for all of them in their order.

        Raises:
            QuantizationError: there are others than those of the batch, as in a layer that is given some only and
                nobody tells which.
        """
        if self.valid is None:
            return flat, positions
        if positions is None and flat.shape[0] != self.token_ids.numel():
            raise QuantizationError(
                f"a layer was given {flat.shape[0]} of a batch's {self.token_ids.numel()} positions, so that padding "
                "cannot be told from tokens",
                "set calibration.packing: full, which needs no padding",
            )
        if positions is None:
            return flat.index_select(0, self.valid), None
        places = torch.full((self.token_ids.numel(),), -1, device=flat.device)
        places[self.valid] = torch.arange(len(self.valid), device=flat.device)
        kept = (places[positions] >= 0).nonzero().squeeze(1)
        return flat.index_select(0, kept), places[positions.index_select(0, kept)]

    def places(self, starts: torch.Tensor) -> torch.Tensor:
        """Which calibration tokens its tokens are, int64 ``[tokens]``.

        Args:
            starts: see :func:`row_starts`.
        """
        lengths = self.row_lengths()
        found = [torch.arange(length) + int(starts[row]) for row, length in zip(self.rows, lengths, strict=True)]
        return torch.cat(found).to(self.token_ids.device)

    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return self.lengths or (self.token_ids.shape[1],) * len(self.rows)


def row_starts(batches: Sequence[Batch]) -> tuple[torch.Tensor, int]:
    """Where each row begins among all calibration tokens, int64 ``[rows]``, and how many tokens there are."""
    lengths = {row: length for batch in batches for row, length in zip(batch.rows, batch.row_lengths(), strict=True)}
    sizes = torch.tensor([lengths.get(row, 0) for row in range(max(lengths, default=-1) + 1)], dtype=torch.int64)
    return sizes.cumsum(0) - sizes, int(sizes.sum())


def make_batches(
    rows: Sequence[Sequence[int]],
    device: torch.device,
    may_pad: bool,
    limit: int | None = None,
    inputs: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
    *,
    ends_short: bool = False,
) -> list[Batch]:
    """Batches of rows sorted by length, the longest first.

    Args:
        rows: token ids; an empty row adds nothing.
        device: where the batches go.
        may_pad: whether rows of different length may share a batch; without it, only equal ones do.
        limit: tokens of a batch that has several rows; by default those of :data:`BATCH_TOKENS`.
        inputs: further inputs of the model by the places of rows, each of which is a batch by itself.
        ends_short: the shortest row is a batch by itself, so that a segment can be tried at little cost.
    """
    apart = inputs or {}
    limit = BATCH_TOKENS[device.type] if limit is None else limit
    batches: list[list[int]] = []
    for place in sorted((place for place, row in enumerate(rows) if len(row)), key=lambda each: -len(rows[each])):
        last = batches[-1] if batches else []
        fits = bool(last) and not {last[0], place} & apart.keys() and (len(last) + 1) * len(rows[last[0]]) <= limit
        if fits and (may_pad or len(rows[last[0]]) == len(rows[place])):
            last.append(place)
        else:
            batches.append([place])
    if ends_short and batches and len(batches[-1]) > 1:
        batches.append([batches[-1].pop()])
    return [
        replace(
            _batch(rows, members, device),
            inputs={name: tensor.to(device) for name, tensor in apart.get(members[0], {}).items()},
        )
        for members in batches
    ]


def _batch(given: Sequence[Sequence[int]], members: Sequence[int], device: torch.device) -> Batch:
    rows = [given[place] for place in members]
    length = len(rows[0])
    padded = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], dtype=torch.int64)
    if all(len(row) == length for row in rows):
        return Batch(padded.to(device), None, tuple(members))
    valid = torch.cat([torch.arange(len(row)) + index * length for index, row in enumerate(rows)])
    return Batch(padded.to(device), valid.to(device), tuple(members), lengths=tuple(map(len, rows)))
