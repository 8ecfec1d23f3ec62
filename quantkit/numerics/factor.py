"""The factor of the inverse Hessian that drives the column solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.errors import QuantizationError
from quantkit.system.host import decide

MAX_DAMPING = 10.0


@dataclass(frozen=True, slots=True)
class Curvature:
    """How the error of a layer grows with the errors of its weights; the same for all layers of an input.

    Attributes:
        gram: float32 ``[in_features, in_features]``.
        hessian: the same, damped.
        order: columns with the strongest inputs first, or None for the order in which they lie.
        factor: see :func:`inverse_factor`, in that order.
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
    def of(cls, gram: torch.Tensor, damping: float, activation_order: bool) -> Curvature:
        """The curvature of inputs with this Gram matrix.

        Raises:
            QuantizationError: it cannot be factorized.
        """
        order = gram.diagonal().argsort(descending=True, stable=True) if activation_order else None
        factor, used = inverse_factor(gram if order is None else gram[order][:, order], damping)
        return cls(gram, damped(gram, used), order, factor, damping, used)

    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return (f"damping raised from {self.damping:g} to {self.used:g}",) if self.used > self.damping else ()


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """``gram`` with ``damping`` times its mean diagonal added to the diagonal.

    Inputs that were never active have a zero diagonal; they get one, so that their weights are rounded and
    disturb nothing.
    """
    diagonal = gram.diagonal()
    ridge = diagonal.mean() * damping
    raised = gram.clone()
    floor = torch.where(diagonal > 0, 0.0, torch.where(ridge > 0, ridge, 1.0))
    raised.diagonal().add_(ridge + floor)
    return raised


def inverse_factor(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """The upper Cholesky factor of the inverse of the damped Gram matrix.

    Where the factorization fails the damping is doubled and tried again.

    Args:
        gram: float32 ``[in_features, in_features]``, symmetric.
        damping: fraction of the mean diagonal that is added.

    Returns:
        ``U`` with ``Uᵀ U = H⁻¹``, and the damping that was needed.

    Raises:
        QuantizationError: the matrix holds NaN or infinities, or no damping helps.
    """
    tried = damping
    while tried <= MAX_DAMPING:
        # With the order of rows and columns reversed, H = L Lᵀ becomes H = R Rᵀ with R upper, and U = R⁻¹.
        lower, failed = torch.linalg.cholesky_ex(damped(gram, tried).flip(0, 1))
        if not decide(failed.any()):
            upper = lower.flip(0, 1)
            identity = torch.eye(upper.shape[0], device=upper.device)
            factor = torch.linalg.solve_triangular(upper, identity, upper=True)
            if decide(factor.isfinite().all()):
                return factor, tried
        tried = max(tried * 2, 1e-4)
    raise QuantizationError(
        f"the statistics of a layer's inputs cannot be factorized at any damping from {damping:g} to {MAX_DAMPING:g}",
        "they hold NaN or infinities: check the model and the calibration texts",
    )
