"""Refinement of a solved weight: better scales for its codes, then better codes for its scales.

Both lower the same quantity, the layer error ``Σ (w - ŵ) H (w - ŵ)ᵀ`` with the damped Gram matrix ``H`` of
the inputs. With the codes held, the error is quadratic in the scales of a row, which a small linear system
solves exactly. With the scales held, each code in turn goes to its best value given all others
(coordinate descent), which can only lower the error.

As in :mod:`quantkit.numerics.columns` everything lies transposed, ``[columns, rows]``, but in the order of
the checkpoint, so that groups are contiguous. ``steps`` are ``code - zero``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantkit.numerics.grids import spread, stored
from quantkit.schemes import IntScheme

BLOCK = 32


@dataclass(frozen=True, slots=True)
class Problem:
    """A layer to refine.

    Attributes:
        weight: float32 ``[columns, rows]``, the float weight.
        gram: float32 ``[columns, columns]``, by which errors are told.
        hessian: the same, damped, which is what the refinement lowers.
        zeros: float32 ``[columns, rows]``.
        scheme: the grid.
    """

    weight: torch.Tensor
    gram: torch.Tensor
    hessian: torch.Tensor
    zeros: torch.Tensor
    scheme: IntScheme

    @property
    def limits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lowest and highest step of each weight, ``[columns, rows]``."""
        return -self.zeros, (self.scheme.levels - 1) - self.zeros

    def codes(self, steps: torch.Tensor) -> torch.Tensor:
        """uint8 ``[rows, columns]``."""
        return (steps + self.zeros).to(torch.uint8).T.contiguous()

    def errors(self, steps: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Error of each row for steps ``[columns, rows]`` and scales ``[rows, groups]``."""
        spread_scales = spread(scales.float(), self.weight.shape[0])
        return row_errors(torch.addcmul(self.weight, steps, spread_scales, value=-1), self.gram)

    def energy(self) -> torch.Tensor:
        """The error of leaving the layer out, ``[rows]``."""
        return row_errors(self.weight, self.gram)


def refine(
    problem: Problem, steps: torch.Tensor, scales: torch.Tensor, rounds: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Refit scales and descend over codes, ``rounds`` times; a row that this does not improve is left alone.

    Args:
        problem: the layer.
        steps: ``[columns, rows]``, from the solver.
        scales: ``[rows, groups]`` in ``scale_dtype``.
        rounds: how often.
        scale_dtype: dtype in which scales are stored.

    Returns:
        The steps and scales found, as they came.
    """
    if rounds == 0:
        return steps, scales
    columns, groups = problem.weight.shape[0], scales.shape[1]
    found, refitted = steps.clone(), scales
    for _ in range(rounds):
        refitted = stored(refit_scales(problem.weight, found, problem.hessian, groups).T, scale_dtype)
        descend(problem.weight, found, spread(refitted.float(), columns), problem.limits, problem.hessian)
    better = problem.errors(found, refitted) < problem.errors(steps, scales)
    return torch.where(better, found, steps), torch.where(better.unsqueeze(1), refitted, scales)


def refit_scales(
    weight: torch.Tensor, steps: torch.Tensor, hessian: torch.Tensor, groups: int
) -> torch.Tensor:
    """The scales of least layer error for given codes.

    Args:
        weight: float32 ``[columns, rows]``, the float weight.
        steps: float32 ``[columns, rows]``.
        hessian: float32 ``[columns, columns]``, positive definite.
        groups: number of groups; each holds ``columns / groups`` neighbouring columns.

    Returns:
        float32 ``[groups, rows]``.
    """
    columns, rows = weight.shape
    size = columns // groups
    target = (hessian @ weight).mul_(steps).view(groups, size, rows).sum(1)
    system = torch.empty(groups, groups, rows, device=weight.device)
    for group in range(groups):
        start, stop = group * size, (group + 1) * size
        response = hessian[start:, start:stop] @ steps[start:stop]
        part = response.mul_(steps[start:]).view(groups - group, size, rows).sum(1)
        system[group:, group] = part
        system[group, group:] = part
    system = system.permute(2, 0, 1).contiguous()
    # A group whose codes are all zero leaves its scale undetermined.
    ridge = system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    system.diagonal(dim1=1, dim2=2).add_(ridge * 1e-6)
    solved: torch.Tensor = torch.linalg.solve(system, target.T)
    return solved.T.contiguous()


def descend(
    weight: torch.Tensor,
    steps: torch.Tensor,
    scales: torch.Tensor,
    limits: tuple[torch.Tensor, torch.Tensor],
    hessian: torch.Tensor,
) -> None:
    """One sweep of coordinate descent over the codes; ``steps`` is changed in place.

    Args:
        weight: float32 ``[columns, rows]``, the float weight.
        steps: float32 ``[columns, rows]``.
        scales: float32 ``[columns, rows]``, the scale of each weight.
        limits: lowest and highest step, float32 ``[columns, rows]``.
        hessian: float32 ``[columns, columns]``, positive definite.
    """
    columns, rows = weight.shape
    inverse_scales = 1 / scales
    missing = torch.addcmul(weight, steps, scales, value=-1)
    pull = hessian / hessian.diagonal().unsqueeze(1)
    moves = torch.empty(BLOCK, rows, device=weight.device)
    nearest = torch.empty(rows, device=weight.device)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        wanted = pull[start:stop] @ missing
        for column in range(start, stop):
            done = column - start
            current = wanted[done]
            if done:
                current.addmv_(moves[:done].T, pull[column, start:column], alpha=-1)
            torch.addcmul(steps[column], current, inverse_scales[column], out=nearest).round_()
            torch.clamp(nearest, limits[0][column], limits[1][column], out=nearest)
            torch.sub(nearest, steps[column], out=moves[done]).mul_(scales[column])
            steps[column].copy_(nearest)
        missing[start:stop].sub_(moves[: stop - start])


def row_errors(difference: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
    """Mean square error of the outputs, float32 ``[rows]``.

    Args:
        difference: float32 ``[columns, rows]``, the float weight less the quantized one.
        gram: ``XᵀX / tokens``; None takes inputs as uncorrelated and of unit variance.
    """
    if gram is None:
        return difference.square().sum(0)
    return (gram @ difference).mul_(difference).sum(0).clamp_(min=0)
