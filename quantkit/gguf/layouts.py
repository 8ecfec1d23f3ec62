"""How a tensor lies in a GGUF file where it lies otherwise than in transformers' checkpoints, and back.

llama.cpp wants another order of rows where its graph rotates neighbouring columns of a head, or cuts a fused matrix
into queries, keys and values; 1 added to norms that add it themselves; and ``[out_features, in_features]`` throughout.
The orders are those of the package ``conversion`` of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Heads:
    """How many heads a model has.

    Attributes:
        queries: heads of queries.
        keys: heads of keys, and of values.
        key_size: of a head of keys, those of its columns that are not rotated; told where keys and values are made of
            one matrix, head by head.
    """

    queries: int
    keys: int
    key_size: int = 0


Order = Callable[[Heads, int], torch.Tensor]
"""Of heads and a number of rows: for every row of the file, which row of the checkpoint it is, int64 ``[rows]``."""


@dataclass(frozen=True, slots=True)
class Values:
    """What a file holds in place of a tensor's values.

    Attributes:
        to_file: of a checkpoint's values, in float32.
        from_file: the inverse.
    """

    to_file: Callable[[torch.Tensor], torch.Tensor]
    from_file: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor lies in a file.

    Attributes:
        order: of its rows; None where they stay.
        values: what stands for its values; None where they stay.
        transposed: whether the checkpoint holds it as ``[in_features, out_features]``. Packed layers never lie so.
        squeezed: whether the checkpoint has a second dimension of one that the file has not.
    """

    order: Order | None = None
    values: Values | None = None
    transposed: bool = False
    squeezed: bool = False

    def to_file(self, tensor: torch.Tensor, heads: Heads) -> torch.Tensor:
        """A float tensor of a checkpoint as the file holds it."""
        tensor = tensor.T if self.transposed else tensor.squeeze(1) if self.squeezed else tensor
        tensor = self.rows_to_file(tensor, heads)
        return tensor if self.values is None else self.values.to_file(tensor)

    def from_file(self, tensor: torch.Tensor, heads: Heads) -> torch.Tensor:
        """The inverse of :meth:`to_file`, of a tensor whose :attr:`values` are the checkpoint's already."""
        tensor = self.rows_from_file(tensor, heads)
        return tensor.T.contiguous() if self.transposed else tensor.unsqueeze(1) if self.squeezed else tensor

    def rows_to_file(self, tensor: torch.Tensor, heads: Heads) -> torch.Tensor:
        """The rows of a tensor, packed or not, in the file's order."""
        return tensor if self.order is None else tensor[self.order(heads, len(tensor))]

    def rows_from_file(self, tensor: torch.Tensor, heads: Heads) -> torch.Tensor:
        """The inverse of :meth:`rows_to_file`."""
        return tensor if self.order is None else tensor[self.order(heads, len(tensor)).argsort()]

    def shape_in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a checkpoint's float tensor of a shape has in the file."""
        return shape[::-1] if self.transposed else (shape[0], *shape[2:]) if self.squeezed else shape

    def shape_in_checkpoint(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a file's tensor of a shape has in a checkpoint."""
        return shape[::-1] if self.transposed else (shape[0], 1, *shape[1:]) if self.squeezed else shape


def rotated_queries(heads: Heads, rows: int) -> torch.Tensor:
    """Rows that transformers rotates half a head apart, as neighbours: the queries of a llama."""
    return _neighbours(heads.queries, rows)


def rotated_keys(heads: Heads, rows: int) -> torch.Tensor:
    """The same of keys."""
    return _neighbours(heads.keys, rows)


def kind_by_kind(heads: Heads, rows: int) -> torch.Tensor:
    """All queries, then all keys, then all values, where each head of keys has its own queries before it."""
    shared = heads.queries // heads.keys
    lies = torch.arange(rows).view(heads.keys, shared + 2, -1)
    return torch.cat([lies[:, :shared].flatten(), lies[:, shared].flatten(), lies[:, shared + 1].flatten()])


def _neighbours(heads: int, rows: int) -> torch.Tensor:
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


@dataclass(frozen=True, slots=True)
class Pieces:
    """How one tensor of a checkpoint lies in several of a file, or in one of another name.

    Attributes:
        parts: what the package gguf is asked for each piece, in place of the end of the tensor's name.
        cut: the pieces, as files hold them, of the tensor.
        join: the tensor of its pieces.
        rows: whether the pieces are rows of the tensor, so that a packed layer can be cut, too.
        leaves: of a stack of experts, what a projection that a piece stacks is called.
    """

    parts: tuple[str, ...]
    cut: Callable[[torch.Tensor, Heads], Sequence[torch.Tensor]]
    join: Callable[[Sequence[torch.Tensor], Heads], torch.Tensor]
    rows: bool = False
    leaves: tuple[str, ...] = ()


def as_it_is(*parts: str, leaves: tuple[str, ...] = ()) -> Pieces:
    """One piece, which is the tensor."""
    return Pieces(parts, lambda tensor, _: (tensor,), lambda pieces, _: pieces[0], True, leaves)


def turned(*parts: str, leaves: tuple[str, ...] = ()) -> Pieces:
    """One piece, a stack of matrices that the checkpoint holds as ``[experts, in_features, out_features]``."""
    return Pieces(parts, lambda tensor, _: (tensor.mT,), lambda pieces, _: pieces[0].mT.contiguous(), leaves=leaves)


def halves(*parts: str, leaves: tuple[str, ...] = ()) -> Pieces:
    """The rows of two projections, one after the other."""
    return Pieces(
        parts, lambda tensor, _: tensor.chunk(2, -2), lambda pieces, _: torch.cat(list(pieces), -2), True, leaves
    )


def alternating(*parts: str) -> Pieces:
    """Two vectors whose values take turns."""
    return Pieces(
        parts,
        lambda tensor, _: (tensor[..., ::2], tensor[..., 1::2]),
        lambda pieces, _: torch.stack(list(pieces), -1).flatten(-2),
    )


def turned_alternating(*parts: str, leaves: tuple[str, ...] = ()) -> Pieces:
    """Two projections whose rows take turns, in a stack of matrices ``[experts, in_features, out_features]``."""
    return Pieces(
        parts,
        lambda tensor, _: (tensor[..., ::2].mT, tensor[..., 1::2].mT),
        lambda pieces, _: torch.stack([piece.mT for piece in pieces], -1).flatten(-2),
        leaves=leaves,
    )


def keys_and_values(*parts: str) -> Pieces:
    """The keys and the values that each head makes of the compressed ones; the keys' matrices lie transposed."""

    def cut(tensor: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
        each = tensor.view(heads.queries, -1, tensor.shape[-1])
        return each[:, : heads.key_size].mT, each[:, heads.key_size :]

    return Pieces(parts, cut, lambda pieces, _: torch.cat([pieces[0].mT, pieces[1]], 1).flatten(0, 1))


AS_IT_IS = Layout()
NORM_PLUS_ONE = Layout(values=Values(lambda norm: norm + 1, lambda norm: norm - 1))
DECAY = Layout(values=Values(lambda log: -log.exp(), lambda decay: (-decay).log()))
"""Of a state, whose logarithm checkpoints hold."""
SQUEEZED = Layout(squeezed=True)
TRANSPOSED = Layout(transposed=True)
ROTATED = {"attn_q": Layout(rotated_queries), "attn_k": Layout(rotated_keys)}
"""Where the graph rotates neighbours, and transformers halves."""
