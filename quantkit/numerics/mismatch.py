"""Weights that make up for what the layers before them lost.

A layer of a quantized model is given inputs ``X̃`` where the float model's has ``X``. With ``H = X̃ᵀX̃`` and what the
float model's layer gives beyond what its weight makes of ``X̃``, ``T = XWᵀ - X̃Wᵀ``,

    ``|XWᵀ - X̃Qᵀ|² = |X̃(W* - Q)ᵀ|² + a constant``, where ``W*ᵀ = Wᵀ + H⁻¹X̃ᵀT``,

so that a solver which is handed ``W*`` in the place of ``W`` aims at the output of the float model (Qronos,
arXiv:2505.11695, and GPTAQ, arXiv:2504.02692, do this column by column). Of a layer that adds to the residual stream
``T`` has what the stream lost before it, too (LoaQ, arXiv:2509.06297).

A full correction fits the calibration tokens as much as the model. So how much is taken of each part, that of the
inputs and that of the stream, and how far both are damped is found on tokens that are held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from quantkit.numerics.factor import damped
from quantkit.system.host import decide, numbers
from quantkit.system.products import product

LEAST, LESS, MORE, MOST = 0.03, 0.3, 3.0, 30.0
"""Dampings that are tried, shares of the Gram matrix's mean diagonal: the middle two, and the one beyond the better."""
SWEEPS = 16
"""Rounds in which the shares of parts are found, each for what the others are by then."""
JUDGED_ROWS = 64
"""Rows of a layer on which its share is found; of more an even selection."""
SOLVED_ROWS = 4096
"""Rows that are corrected at a time."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """What layers that share an input are to make up for.

    Attributes:
        cross: float32 ``[in_features, k]``, the mean of ``X̃ᵀZ`` over tokens that are not held out. ``Z`` is ``X - X̃``,
            or where outputs are known ``T`` of the only layer, in parts beside each other that add up to it.
        inputs: ``[held, in_features]``, ``X̃`` of the tokens that are held out.
        targets: ``[held, k]``, their ``Z``.
        weights: float32 ``[held]``, how much each counts; None if all alike.
        share: of the tokens that are held out, by weight.
        knows_outputs: see ``cross``.
        parts: in which ``T`` is known: 1, or 2 where what the residual stream lost comes after what the inputs did.
    """

    cross: torch.Tensor
    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor | None
    share: float
    knows_outputs: bool
    parts: int = 1

    def held(self) -> torch.Tensor:
        """The inputs of the tokens that are held out, float32, each times the root of its weight."""
        return _weighed(self.inputs.float(), self.weights)

    def aims(self, weight: torch.Tensor, rows: slice, part: int) -> torch.Tensor:
        """A part of ``T`` of the tokens that are held out, float32 ``[held, rows]``, each times the root of its weight.

        Args:
            weight: float32 ``[out_features, in_features]``.
            rows: of it.
            part: from 0.
        """
        if not self.knows_outputs:
            return _weighed(product(self.targets.float(), weight[rows].T), self.weights)
        return _weighed(_part(self.targets, self.parts, part)[:, rows].float(), self.weights)

    def moments(self, weight: torch.Tensor, rows: slice, part: int) -> torch.Tensor:
        """The mean of ``X̃ᵀT`` over tokens that are not held out, ``[in_features, rows]``; it may share memory."""
        if self.knows_outputs:
            return _part(self.cross, self.parts, part)[:, rows]
        return product(self.cross, weight[rows].T)

    def all_moments(self, weight: torch.Tensor, rows: slice, shares: Sequence[float]) -> torch.Tensor:
        """The same over all tokens, the parts added up by their shares."""
        held = self.held()
        count = len(held) if self.weights is None else self.weights.sum()
        found = torch.zeros(len(self.cross), len(weight[rows]), device=weight.device)
        for part, share in enumerate(shares):
            found.add_(self.moments(weight, rows, part), alpha=share * (1 - self.share))
            found.add_(product(held.T, self.aims(weight, rows, part) * (share * self.share / count)))
        return found


def _part(values: torch.Tensor, parts: int, part: int) -> torch.Tensor:
    """A part of values ``[n, k]``, ``[n, k / parts]``."""
    return values.view(len(values), parts, -1)[:, part]


@dataclass(frozen=True, slots=True)
class Correction:
    """How layers are corrected.

    Attributes:
        shares: of each layer and part, from 0 for what is not made up for to 1 for the whole.
        gain: by how much the error of the tokens that are held out falls, relative to what was lost, summed over the
            layers.
        damping: of ``H``, a share of its mean diagonal.
        factor: lower Cholesky factor of the damped ``H``.
    """

    shares: tuple[tuple[float, ...], ...]
    gain: float
    damping: float
    factor: torch.Tensor


def corrected(
    weight: torch.Tensor, sizes: Sequence[int], gram: torch.Tensor, mismatch: Mismatch
) -> tuple[torch.Tensor, tuple[float, ...]]:
    """A weight that makes up for what its inputs lost, as far as tokens that are held out say that it does.

    Args:
        weight: float32 ``[out_features, in_features]``, of several layers one below another.
        sizes: rows of each.
        gram: float32 ``[in_features, in_features]``, the mean of ``X̃ᵀX̃``.
        mismatch: of their input.

    Returns:
        The weight, itself where nothing is gained, and of each layer how much of the correction was taken, the mean of
        its parts.
    """
    best = _chosen(weight, sizes, gram, mismatch)
    if best is None:
        return weight, (0.0,) * len(sizes)
    taken = tuple(sum(shares) / len(shares) for shares in best.shares)
    if not any(taken):
        return weight, taken
    found = weight.clone()
    for rows, shares in zip(_blocks(sizes), best.shares, strict=True):
        for start in range(rows.start, rows.stop, SOLVED_ROWS) if any(shares) else ():
            some = slice(start, min(start + SOLVED_ROWS, rows.stop))
            moments = mismatch.all_moments(weight, some, shares)
            found[some].add_(torch.cholesky_solve(moments, best.factor).T)
    return found, taken


def _chosen(weight: torch.Tensor, sizes: Sequence[int], gram: torch.Tensor, mismatch: Mismatch) -> Correction | None:
    """The correction that lowers the error of the tokens that are held out most; None where none can be found."""
    held, parts = mismatch.held(), range(mismatch.parts)
    judged = [slice(each.start, each.stop, -(-(each.stop - each.start) // JUDGED_ROWS)) for each in _blocks(sizes)]
    aims = [torch.stack([mismatch.aims(weight, rows, part) for part in parts]).sum(0) for rows in judged]
    if len(held) < 2 or decide(torch.stack([each.any() for each in aims]).any().logical_not()):
        return None

    def better(best: Correction | None, damping: float) -> Correction | None:
        factor = _factor(gram, damping)
        if factor is None:
            return best
        found = []
        for rows, aim in zip(judged, aims, strict=True):
            moments = (mismatch.moments(weight, rows, part) for part in parts)
            added = [product(held, torch.cholesky_solve(each, factor)) for each in moments]
            found.append(_judged(torch.stack(added), aim))
        figures, each = numbers(torch.cat(found)), len(parts) + 1
        gain = sum(figures[each - 1 :: each])
        if best is not None and gain <= best.gain:
            return best
        starts = range(0, len(figures), each)
        return Correction(tuple(tuple(figures[start : start + each - 1]) for start in starts), gain, damping, factor)

    best = better(better(None, LESS), MORE)
    return better(best, MOST if best is not None and best.damping == MORE else LEAST)


def _judged(outputs: torch.Tensor, aims: torch.Tensor) -> torch.Tensor:
    """The shares of a correction that are worth taking, and by how much they lower the error, relative.

    The error is a paraboloid of the shares, whose slopes are means of products over the tokens. One standard error of
    its mean is taken off each, so that a gain which these tokens cannot tell from chance is none.

    Args:
        outputs: ``[parts, tokens, rows]``, what the whole of each part adds.
        aims: ``[tokens, rows]``, what they should come to.

    Returns:
        float32 ``[parts + 1]``.
    """
    tiny = torch.finfo(torch.float32).tiny
    along = (outputs * aims).sum(2)
    slopes = along.sum(1)
    sure = slopes - along.std(1) * along.shape[1] ** 0.5
    curves = outputs.flatten(1) @ outputs.flatten(1).T
    widths = curves.diagonal().clamp(min=tiny)
    shares = torch.zeros_like(slopes)
    for part in list(range(len(shares))) * (SWEEPS if len(shares) > 1 else 1):
        others = curves[part] @ shares - curves[part, part] * shares[part]
        shares[part] = ((sure[part] - others) / widths[part]).clamp(0, 1)
    gain = (2 * slopes @ shares - shares @ curves @ shares) / aims.square().sum().clamp(min=tiny)
    return torch.cat([shares, gain.unsqueeze(0)]).nan_to_num(0.0)


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
