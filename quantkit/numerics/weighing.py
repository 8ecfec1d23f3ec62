"""How the errors of a group's weights count: alike, by the strength of their inputs, or by correlations too."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.schemes.grids import Grids


@dataclass(frozen=True, slots=True)
class Weighing:
    """The quadratic form ``e H eᵀ`` by which the errors ``e`` of a group are judged.

    Attributes:
        column_weights: its diagonal, float32 broadcastable to ``[A, G, S]``.
        blocks: the whole form of each group, float32 ``[G, S, S]``; None where it is diagonal.
    """

    column_weights: torch.Tensor
    blocks: torch.Tensor | None = None

    @classmethod
    def of(cls, grids: Grids, importance: torch.Tensor | None, columns: int, device: torch.device) -> Weighing:
        """From what is known of the inputs.

        Args:
            grids: of the weight.
            importance: float32 ``[columns]``, the mean square of each input; ``[columns, columns]``, their Gram matrix,
                of which the blocks of the groups are used; None weighs all alike, and so does a group without inputs.
            columns: of the weight.
            device: of the weight.
        """
        matrix = importance if importance is not None and importance.ndim == 2 else None
        column_weights = grids.column_weights(importance if matrix is None else matrix.diagonal(), columns, device)
        if matrix is None or column_weights.numel() != columns:
            return cls(column_weights)
        groups, size = column_weights.shape[1], column_weights.shape[2]
        blocks = matrix.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).float()
        dead = blocks.diagonal(dim1=1, dim2=2).amax(-1) <= 0
        alike = torch.eye(size, device=device).expand_as(blocks)
        return cls(column_weights, torch.where(dead.view(-1, 1, 1), alike, blocks))

    def __call__(self, groups: torch.Tensor) -> torch.Tensor:
        """``groups @ H``, as a new tensor."""
        if self.blocks is None:
            return groups * self.column_weights
        return torch.bmm(groups.transpose(0, 1), self.blocks).transpose(0, 1)
