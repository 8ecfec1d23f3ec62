"""Low-rank terms that take up what quantization lost: ``W ~ W_hat + up @ down``.

The best of a rank is known in closed form. With ``E = W - W_hat`` and the Gram matrix ``G`` of the layer's input, the
loss of the output is ``tr((E - UD) G (E - UD)^T)``. Its least value over all ``UD`` of rank ``r`` is the sum of the
squares of the singular values of ``E G^(1/2)`` after the first ``r`` (Eckart and Young 1936), and it is reached where
``U`` spans the first ``r`` left singular vectors and ``D = U^T E``. That is the solution of EoRA (arXiv:2410.21271),
which projects ``E`` into the eigenspace of ``G``, cuts there and maps back, without the inverse of a root of ``G``;
where ``G`` is the identity it is the first step of LoftQ (arXiv:2310.08659), the plain SVD of the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ALIGNMENTS = 3
"""How often factors of columns and of rows are fitted in turn."""
EXPLAINED = 0.1
CHANCE = 4.0
"""Factors must explain more than this share of a difference, and so many times what each explains by chance."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """A product of two thin matrices, as LoRA (arXiv:2106.09685) adds it to a weight.

    Attributes:
        down: LoRA's ``A``, float32 ``[rank, in_features]``.
        up: LoRA's ``B``, float32 ``[out_features, rank]``.
    """

    down: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        """How many numbers stand between the two."""
        return self.down.shape[0]

    def product(self) -> torch.Tensor:
        """What it adds to the weight, float32 ``[out_features, in_features]``."""
        return self.up @ self.down


def closest(error: torch.Tensor, gram: torch.Tensor | None, rank: int) -> LowRank:
    """The product of a rank that leaves the least of an error.

    The same input gives the same signs: of each column of ``up`` the number of largest magnitude is positive, the first
    of several. Both matrices have equal norms, term by term, so that a training moves both alike; the terms come in
    their order, the one that takes up most first. Where the error has fewer terms than ``rank`` the rest are zero.

    Args:
        error: ``[out_features, in_features]``.
        gram: of the input, ``[in_features, in_features]``, by which the error is weighed; None weighs all alike.
        rank: at least 1.
    """
    exact = error.double()
    basis = None
    if exact.shape[0] > exact.shape[1]:
        basis, exact = torch.linalg.qr(exact)
    weighed = exact if gram is None else exact @ gram.double()
    _, vectors = torch.linalg.eigh(weighed @ exact.T)
    vectors = vectors.flip(1)[:, :rank]
    down = vectors.T @ exact
    up = vectors if basis is None else basis @ vectors
    largest = up.gather(0, up.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    sizes = torch.linalg.vector_norm(down, dim=1).sqrt()
    up, down = up * signs * sizes, down * signs.T / sizes.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    lacking = rank - down.shape[0]
    if lacking > 0:
        up = torch.nn.functional.pad(up, (0, lacking))
        down = torch.nn.functional.pad(down, (0, 0, 0, lacking))
    return LowRank(down.float().contiguous(), up.float().contiguous())


def aligned(weight: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """A float weight, scaled as the weight that was quantized was scaled before.

    Methods such as AWQ multiply the columns of a weight by factors and divide its rows by those of the layer behind it,
    which the model as a whole does not notice. What was lost is told against the scaled weight. The factors are fitted,
    and taken where they explain clearly more of the difference than a single factor for all does, by which few bits
    shrink a weight.

    Args:
        weight: float32 ``[out_features, in_features]``.
        packed: the quantized one, decoded.

    Returns:
        ``weight`` itself, or a scaled copy.
    """
    rows, columns = torch.ones(weight.shape[0], 1), torch.ones(1, weight.shape[1])
    rows, columns = rows.to(weight), columns.to(weight)
    tiny = torch.finfo(weight.dtype).tiny
    for _ in range(ALIGNMENTS):
        scaled = weight * rows
        columns = (scaled * packed).sum(0, keepdim=True) / scaled.square().sum(0, keepdim=True).clamp(min=tiny)
        scaled = weight * columns
        rows = (scaled * packed).sum(1, keepdim=True) / scaled.square().sum(1, keepdim=True).clamp(min=tiny)
    found = weight * rows * columns
    shrunk = weight * ((weight * packed).sum() / weight.square().sum().clamp(min=tiny))
    left = 1 - EXPLAINED - CHANCE * sum(weight.shape) / weight.numel()
    explains = (found - packed).square().sum() < left * (shrunk - packed).square().sum()
    return found if explains else weight
