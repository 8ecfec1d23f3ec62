"""How a tensor lies in a GGUF file where it lies otherwise than in transformers' checkpoints, and back.

llama.cpp wants another order of rows where its graph rotates neighbouring columns of a head, or cuts a fused matrix
into queries, keys and values; 1 added to norms that add it themselves; and ``[out_features, in_features]`` throughout.
The orders are those of the package ``conversion`` of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Heads:
    """How many heads a model has.

    Attributes:
        queries: heads of queries.
        keys: heads of keys, and of values.
    """

    queries: int
    keys: int


Order = Callable[[Heads, int], torch.Tensor]
"""Of heads and a number of rows: for every row of the file, which row of the checkpoint it is, int64 ``[rows]``."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor lies in a file.

    Attributes:
        order: of its rows; None where they stay.
        added: to its values.
        transposed: whether the checkpoint holds it as ``[in_features, out_features]``. Packed layers never lie so.
        squeezed: whether the checkpoint has a second dimension of one that the file has not.
    """

    order: Order | None = None
    added: float = 0.0
    transposed: bool = False
    squeezed: bool = False

    def to_file(self, tensor: torch.Tensor, heads: Heads) -> torch.Tensor:
        """A float tensor of a checkpoint as the file holds it."""
        tensor = tensor.T if self.transposed else tensor.squeeze(1) if self.squeezed else tensor
        tensor = self.rows_to_file(tensor, heads)
        return tensor + self.added if self.added else tensor

    def from_file(self, tensor: torch.Tensor, heads: Heads) -> torch.Tensor:
        """The inverse of :meth:`to_file`, of a tensor from whose values :attr:`added` was taken."""
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


AS_IT_IS = Layout()
NORM_PLUS_ONE = Layout(added=1.0)
TRANSPOSED = Layout(transposed=True)
ROTATED = {"attn_q": Layout(rotated_queries), "attn_k": Layout(rotated_keys)}
"""Where the graph rotates neighbours, and transformers halves."""
