"""Weights that make up for what the layers before them lost.

A layer of a quantized model is given inputs ``X̃`` where the float model's has ``X``. With ``H = X̃ᵀX̃`` and what the
float model's layer gives beyond what its weight makes of ``X̃``, ``T = XWᵀ - X̃Wᵀ``,

    ``|XWᵀ - X̃Qᵀ|² = |X̃(W* - Q)ᵀ|² + a constant``, where ``W*ᵀ = Wᵀ + H⁻¹X̃ᵀT``,

so that a solver which is handed ``W*`` in the place of ``W`` aims at the output of the float model (Qronos,
arXiv:2505.11695, and GPTAQ, arXiv:2504.02692, do this column by column). Of a layer that adds to the residual stream
``T`` has what the stream lost before it, too (LoaQ, arXiv:2509.06297).

A full correction fits the calibration tokens as much as the model. So how much of it is taken and how far it is damped
is found on tokens that are held out: their error is a parabola of the share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from quantkit.numerics.factor import damped
from quantkit.system.host import decide, numbers

DAMPINGS = (10.0, 100.0, 1000.0)
"""Tried in turn, times that of the method, until one is worse than the one before; each is a factorization."""
JUDGED_ROWS = 128
"""Rows of a layer on which its share is found; of more an even selection."""
SOLVED_ROWS = 4096
"""Rows that are corrected at a time."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """What layers that share an input are to make up for.

    Attributes:
        cross: float32 ``[in_features, k]``, the mean of ``X̃ᵀZ`` over tokens that are not held out. ``Z`` is ``X - X̃``,
            or where outputs are known ``T`` of the only layer.
        inputs: ``[held, in_features]``, ``X̃`` of the tokens that are held out.
        targets: ``[held, k]``, their ``Z``.
        weights: float32 ``[held]``, how much each counts; None if all alike.
        share: of the tokens that are held out, by weight.
        knows_outputs: see ``cross``.
    """

    cross: torch.Tensor
    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None
    share: float
    knows_outputs: bool

    def held(self) -> torch.Tensor:
        """The inputs of the tokens that are held out, float32, each times the root of its weight."""
        return _weighed(self.inputs.float(), self.weights)

    def aims(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        """``T`` of the tokens that are held out, float32 ``[held, rows]``, each times the root of its weight."""
        found = self.targets[:, rows].float() if self.knows_outputs else self.targets.float() @ weight[rows].T
        return _weighed(found, self.weights)

    def moments(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        """The mean of ``X̃ᵀT`` over tokens that are not held out, ``[in_features, rows]``; it may share memory.

        Args:
            weight: float32 ``[out_features, in_features]``.
            rows: of it.
        """
        return self.cross[:, rows] if self.knows_outputs else self.cross @ weight[rows].T

    def all_moments(self, weight: torch.Tensor, rows: slice, held: torch.Tensor) -> torch.Tensor:
        """The same over all tokens."""
        count = len(held) if self.weights is None else self.weights.sum()
        found = self.moments(weight, rows) * (1 - self.share)
        return found.add_(held.T @ self.aims(weight, rows) * (self.share / count))


@dataclass(frozen=True, slots=True)
class Correction:
    """How layers are corrected.

    Attributes:
        shares: of each layer, from 0 for a weight that stays to 1 for the whole correction.
        gain: by how much the error of the tokens that are held out falls, relative to what was lost, summed over the
            layers.
        factor: lower Cholesky factor of the damped ``H``.
    """

    shares: tuple[float, ...]
    gain: float
    factor: torch.Tensor


def corrected(
    weight: torch.Tensor, sizes: Sequence[int], gram: torch.Tensor, mismatch: Mismatch, damping: float
) -> tuple[torch.Tensor, tuple[float, ...]]:
    """A weight that makes up for what its inputs lost, as far as tokens that are held out say that it does.

    Args:
        weight: float32 ``[out_features, in_features]``, of several layers one below another.
        sizes: rows of each.
        gram: float32 ``[in_features, in_features]``, the mean of ``X̃ᵀX̃``.
        mismatch: of their input.
        damping: of the method, a fraction of the mean diagonal.

    Returns:
        The weight, itself where nothing is gained, and of each layer how much of the correction was taken.
    """
    held = mismatch.held()
    best = _chosen(weight, sizes, gram, mismatch, damping, held)
    if best is None:
        return weight, (0.0,) * len(sizes)
    if not any(best.shares):
        return weight, best.shares
    found = weight.clone()
    for rows, share in zip(_blocks(sizes), best.shares, strict=True):
        for start in range(rows.start, rows.stop, SOLVED_ROWS) if share else ():
            part = slice(start, min(start + SOLVED_ROWS, rows.stop))
            moments = mismatch.all_moments(weight, part, held)
            found[part].add_(torch.cholesky_solve(moments, best.factor).T, alpha=share)
    return found, best.shares


def _chosen(
    weight: torch.Tensor,
    sizes: Sequence[int],
    gram: torch.Tensor,
    mismatch: Mismatch,
    damping: float,
    held: torch.Tensor,
) -> Correction | None:
    """The correction that lowers the error of the tokens that are held out most; None where none can be found."""
    parts = [slice(each.start, each.stop, -(-(each.stop - each.start) // JUDGED_ROWS)) for each in _blocks(sizes)]
    aims, best = [mismatch.aims(weight, rows) for rows in parts], None
    if len(held) < 2 or decide(torch.stack([each.any() for each in aims]).any().logical_not()):
        return None
    for tried in (damping * each for each in DAMPINGS):
        factor = _factor(gram, tried)
        if factor is None:
            continue
        steps = [held @ torch.cholesky_solve(mismatch.moments(weight, rows), factor) for rows in parts]
        judged = numbers(torch.cat([_judged(*each) for each in zip(steps, aims, strict=True)]))
        shares, gains = judged[::2], judged[1::2]
        if best is not None and sum(gains) <= best.gain:
            break
        best = Correction(tuple(shares), sum(gains), factor)
    return best


def _judged(outputs: torch.Tensor, aims: torch.Tensor) -> torch.Tensor:
    """The share of a correction that is worth taking, and by how much it lowers the error, relative; float32 ``[2]``.

    The error is a parabola of the share, whose middle is the mean of a product over its tokens. One standard error of
    that mean is taken off, so that a gain which these tokens cannot tell from chance is none.

    Args:
        outputs: ``[tokens, rows]``, what the correction adds.
        aims: ``[tokens, rows]``, what it should.
    """
    along = (outputs * aims).sum(1)
    square = outputs.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    middle = along.sum()
    share = ((middle - along.std() * len(along) ** 0.5) / square).clamp(0, 1)
    gain = (2 * middle * share - share.square() * square) / aims.square().sum().clamp(
        min=torch.finfo(torch.float32).tiny
    )
    return torch.stack([share, gain]).nan_to_num(0.0)


def _factor(gram: torch.Tensor, damping: float) -> torch.Tensor | None:
    """The lower Cholesky factor of a damped Gram matrix; None if there is none."""
    raised = damped(gram, damping)
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(raised.mT, out=(raised.mT, failed))
    return None if decide(failed.any()) else raised.mT


def _blocks(sizes: Sequence[int]) -> Iterator[slice]:
    """The rows of each layer."""
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def _weighed(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return values if weights is None else values * weights.sqrt().unsqueeze(1)
