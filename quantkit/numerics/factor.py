"""The factor of the inverse Hessian that drives the column solver.

A Gram matrix of a wide layer takes gigabytes (3.3 for 28,672 columns), so that what is made of it is made in place: no
more than two matrices are alive beside it, while it is factorized and after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.errors import QuantizationError
from quantkit.system.host import decide
from quantkit.system.products import product

MAX_DAMPING = 10.0
FLIPPED = 1 << 20
"""Numbers that change places at a time."""
INVERTED = 128
"""Rows of a triangle up to which LAPACK inverts it, as a system of equations of which it minds no zeros."""


@dataclass(frozen=True, slots=True)
class Curvature:
    """How the error of a layer grows with the errors of its weights; the same for all layers of an input.

    Attributes:
        gram: float32 ``[in_features, in_features]``.
        hessian: the same, shrunk and damped.
        order: of solving, or None for that in which columns lie.
        factor: see :func:`inverse_factor`, in this order.
        damping: as asked for.
        used: as was needed.
    """

    gram: torch.Tensor
    hessian: torch.Tensor
    order: torch.Tensor | None
    factor: torch.Tensor
    damping: float
    used: float

    @classmethod
    def of(cls, gram: torch.Tensor, damping: float, order: torch.Tensor | None, shrinkage: float = 0.0) -> Curvature:
        """The curvature of inputs with this Gram matrix.

        Args:
            gram: float32 ``[in_features, in_features]``.
            damping: see :func:`damped`.
            order: int64 ``[in_features]``, the columns in the order of solving; None for that in which they lie.
            shrinkage: see :func:`damped`.

        Raises:
            QuantizationError: it cannot be factorized.
        """
        factor, used = inverse_factor(gram, damping, order, shrinkage)
        return cls(gram, damped(gram, used, shrinkage), order, factor, damping, used)

    def column_costs(self) -> torch.Tensor:
        """What an error in a column costs where all columns after it make up for it: GPTQ's ``1 / U_ii²``.

        float32 ``[in_features]``, in the checkpoint's order of columns.
        """
        costs = self.factor.diagonal().square().reciprocal()
        return costs if self.order is None else torch.empty_like(costs).index_copy_(0, self.order, costs)

    def column_weights(self) -> torch.Tensor:
        """How a search for scales weighs the errors of columns, float32 ``[in_features]`` in the checkpoint's order.

        ``sqrt(H_ii) / U_ii``, the geometric mean of what an error in a column costs by itself, ``H_ii``, and of
        :meth:`column_costs`. The second alone suits the calibration inputs better, and others less.
        """
        return self.column_costs().mul_(self.hessian.diagonal()).sqrt_()

    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return (f"damping raised from {self.damping:g} to {self.used:g}",) if self.used > self.damping else ()


def strongest_first(strength: torch.Tensor, together: int = 1) -> torch.Tensor:
    """The columns in which errors count most first, int64 ``[in_features]``.

    Args:
        strength: float32 ``[in_features]``, by how much they count.
        together: so many neighbouring columns stay together, the strongest group first; 1 orders each by itself.
    """
    groups = strength.reshape(-1, together)
    inside = groups.argsort(dim=1, descending=True, stable=True)
    first = groups.sum(1).argsort(descending=True, stable=True)
    return (first.unsqueeze(1) * together + inside[first]).view(-1)


def damped(gram: torch.Tensor, damping: float, shrinkage: float = 0.0) -> torch.Tensor:
    """``gram`` with ``damping`` times its mean diagonal added to the diagonal.

    Inputs that were never active have a zero diagonal; they get one, so that their weights are rounded and
    disturb nothing.

    Args:
        gram: float32 ``[in_features, in_features]``.
        damping: fraction of the mean diagonal.
        shrinkage: share of what lies off the diagonal that is taken away first: correlations of few tokens are partly
            chance, and those of other texts are others (shrinkage to the diagonal, as Schäfer & Strimmer 2005 do).
    """
    return _raised_(gram.clone(), damping, shrinkage)


def _raised_(gram: torch.Tensor, damping: float, shrinkage: float) -> torch.Tensor:
    """:func:`damped`, in place."""
    diagonal = gram.diagonal().clone()
    if shrinkage:
        gram.mul_(1 - shrinkage)
    gram.diagonal().copy_(diagonal + _ridge(diagonal, damping))
    return gram


def _ridge(diagonal: torch.Tensor, damping: float) -> torch.Tensor:
    """What is added to a diagonal, float32 ``[in_features]``."""
    ridge = diagonal.mean() * damping
    return ridge + torch.where(diagonal > 0, 0.0, torch.where(ridge > 0, ridge, 1.0))


def inverse_factor(
    gram: torch.Tensor, damping: float, order: torch.Tensor | None = None, shrinkage: float = 0.0
) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor of the inverse of the damped Gram matrix.

    Where the factorization fails the damping is doubled and tried again.

    Args:
        gram: float32 ``[in_features, in_features]``, symmetric; it is left as it is.
        damping: fraction of the mean diagonal that is added.
        order: int64 ``[in_features]``, the columns in the order of the factor's; None for that in which they lie.
        shrinkage: see :func:`damped`.

    Returns:
        ``U`` with ``Uᵀ U = H⁻¹``, and the damping that was needed.

    Raises:
        QuantizationError: the matrix holds NaN or infinities, or no damping helps.
    """
    tried = damping
    while tried <= MAX_DAMPING:
        # With the order of rows and columns reversed, H = L Lᵀ becomes H = R Rᵀ with R upper, and U = R⁻¹, which is
        # L⁻¹ in the order of H.
        reversed_ = _reversed(gram, tried, order, shrinkage)
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(reversed_, out=(reversed_, failed))
        if not decide(failed.any()):
            _invert_lower_(reversed_)
            _flip_(reversed_.mT.view(-1))
            if decide(torch.stack(reversed_.mT.aminmax()).isfinite().all()):  # of every number it took a matrix more
                return reversed_, tried
        tried = max(tried * 2, 1e-4)
    raise QuantizationError(
        f"the statistics of a layer's inputs cannot be factorized at any damping from {damping:g} to {MAX_DAMPING:g}",
        "they hold NaN or infinities: check the model and the calibration texts",
    )


def _reversed(gram: torch.Tensor, damping: float, order: torch.Tensor | None, shrinkage: float) -> torch.Tensor:
    """A damped copy with rows and columns in the reverse of an order, columns contiguous as LAPACK has them."""
    found = gram.clone() if order is None else gram.index_select(0, order).index_select(1, order)
    _raised_(found, damping, shrinkage)
    _flip_(found.view(-1))
    return found.mT


def _invert_lower_(factor: torch.Tensor) -> None:
    """Put its inverse in the place of a lower triangular matrix, zeros above its diagonal, by products of halves."""
    size, half = len(factor), len(factor) // 2
    if size <= INVERTED:
        inverse = torch.eye(size, device=factor.device)
        factor.copy_(torch.linalg.solve_triangular(factor, inverse, upper=False))
        return
    first, last, below = factor[:half, :half], factor[half:, half:], factor[half:, :half]
    _invert_lower_(first)
    _invert_lower_(last)
    below.copy_(product(last, product(below, first)).neg_())


def _flip_(values: torch.Tensor) -> None:
    """Reverse a vector in place."""
    for start in range(0, len(values) // 2, FLIPPED):
        stop = min(start + FLIPPED, len(values) // 2)
        first, last = values[start:stop], values[len(values) - stop : len(values) - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)
