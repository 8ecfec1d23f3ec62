"""The search of AWQ (Lin et al. 2023, arXiv:2306.00978) for factors of input channels, and that of SmoothQuant's.

Channels with strong inputs get larger weights, so that rounding hurts them less, and the input is divided by the
same factors. The paper tries ``s = mean|x|**alpha`` for some alphas; with ``duo_scaling``, as its code came to do,
a channel's factor also falls with the size of its weights, ``s = mean|x|**alpha / mean|w|**(1 - alpha)``. What
factors are worth is for the method to say that solves the weights after them, on some of their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from quantkit.numerics.activation_rounding import round_inputs, static_scale
from quantkit.schemes import Scheme
from quantkit.schemes.grids import Grid
from quantkit.schemes.rounding import InputRounding
from quantkit.system.host import numbers
from quantkit.system.products import product

SEARCH_ROWS = 192
"""Rows on which factors are tried, of all layers together that read the input; up to twice as many in fact."""
SMALLEST = 1e-4
TIE = 1e-3
"""Errors that differ by less, relative to the least, count as equal: which is less may hang on how a machine rounds."""

RangeSearch = Callable[[torch.Tensor, torch.Tensor], Grid]
"""The grid of a weight ``[rows, in_features]`` for inputs with a Gram matrix."""

Trial = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""The output error for each of some factors, float32 ``[len(factors)]``."""


def pooled(values: torch.Tensor, channels: torch.Tensor | None) -> torch.Tensor:
    """Values per input channel, averaged over those that must get the same factor.

    They are summed on the CPU and in float64: a GPU adds in another order at every run.
    """
    if channels is None:
        return values
    channels, apart = channels.cpu(), values.to("cpu", torch.float64)
    total = torch.zeros_like(apart).index_add_(0, channels, apart)
    members = torch.zeros_like(apart).index_add_(0, channels, torch.ones_like(apart))
    return (total / members.clamp(min=1))[channels].to(values)


def candidate(strength: torch.Tensor, size: torch.Tensor | None, alpha: float) -> torch.Tensor:
    """Factors for one alpha, their geometric mid-range 1.

    Args:
        strength: mean ``|x|`` per channel, float32 ``[in_features]``.
        size: mean ``|w|`` per channel relative to its group's largest; None leaves it out.
        alpha: between 0 and 1.
    """
    factors = strength.clamp(min=SMALLEST).pow(alpha)
    if size is not None:
        factors = factors / (size.pow(1 - alpha) + SMALLEST)
    factors = factors.clamp(min=SMALLEST)
    return factors / (factors.amax() * factors.amin()).sqrt()


def weight_sizes(members: Sequence[tuple[torch.Tensor, Scheme]]) -> torch.Tensor:
    """Mean over all rows of ``|w|`` relative to the largest of its group, float32 ``[in_features]``."""
    total, rows = torch.zeros(members[0][0].shape[1], device=members[0][0].device), 0
    for weight, scheme in members:
        size = scheme.columns_per_group(weight.shape[1])
        width = size if weight.shape[1] % size == 0 else weight.shape[1]
        parts = weight.abs().view(weight.shape[0], -1, width)
        total += (parts / parts.amax(-1, keepdim=True).clamp(min=1e-12)).view_as(weight).sum(0)
        rows += weight.shape[0]
    return total / rows


def rounding_errors(
    weight: torch.Tensor,
    gram: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    factors: Sequence[torch.Tensor],
    search: RangeSearch | None = None,
) -> torch.Tensor:
    """Mean square error of the outputs, summed over rows, when scaled weights are rounded to nearest.

    Args:
        weight: float32 ``[rows, in_features]``.
        gram: float32 ``[in_features, in_features]``.
        scheme: the grid.
        scale_dtype: dtype in which scales are stored.
        factors: each float32 ``[in_features]``.
        search: looks for the grid of a scaled weight, from the Gram matrix of the input divided by the factors; None
            takes the one that spans it.

    Returns:
        float32 ``[len(factors)]``.
    """
    grids, errors = scheme.grids(), []
    for each in factors:
        scaled = weight * each
        groups = grids.grouped(scaled)
        grid = search(scaled, gram / each.outer(each)) if search else grids.spanning(groups, scale_dtype)
        scales = grid.scales.float().unsqueeze(-1)
        missing = torch.addcmul(groups, grids.nearest_(groups / scales, grid.zeros), scales, value=-1)
        missing = grids.ungrouped(missing, weight.shape) / each
        errors.append(product(missing, gram).mul_(missing).sum())
    return torch.stack(errors)


def expected_errors(
    weight: torch.Tensor,
    importance: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    factors: Sequence[torch.Tensor],
) -> torch.Tensor:
    """What rounding is expected to cost: for each weight the square of its step, by how much its column counts.

    A weight is off by some part of the step from level to level, whichever its value, so that the step alone says what
    factors change. This is smooth in the factors, where the error of some rows as they are rounded is not.

    Args:
        weight: float32 ``[rows, in_features]``.
        importance: the cost of an error of each column, float32 ``[in_features]``.
        scheme: the grid.
        scale_dtype: dtype in which scales are stored.
        factors: each float32 ``[in_features]``.

    Returns:
        float32 ``[len(factors)]``, in a unit of its own.
    """
    grids, errors = scheme.grids(), []
    for each in factors:
        grid = grids.spanning(grids.grouped(weight * each), scale_dtype)
        squares = grids.spread(grid.scales.float().square(), *weight.shape)
        errors.append(squares.sum(1) @ (importance / each.square()))
    return torch.stack(errors)


def input_errors(
    weight: torch.Tensor, sample: torch.Tensor, rounding: InputRounding, factors: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Mean square error of the outputs, summed over rows, when inputs divided by factors are rounded.

    Args:
        weight: float32 ``[rows, in_features]``.
        sample: the input of some tokens, float32 ``[tokens, in_features]``.
        rounding: of the input.
        factors: each float32 ``[in_features]``.

    Returns:
        float32 ``[len(factors)]``.
    """
    errors = []
    for each in factors:
        scaled = sample / each
        scale = static_scale(scaled.abs().amax(), rounding) if rounding.static else None
        missing = product(scaled - round_inputs(scaled, rounding, scale), (weight * each).T)
        errors.append(missing.square().sum() / len(sample))
    return torch.stack(errors)


@dataclass(frozen=True, slots=True)
class Strength:
    """What factors are powers of.

    Attributes:
        inputs: strength of each channel, float32 ``[in_features]``; factors are its power ``alpha``.
        weights: size of the weights of each channel, whose power ``1 - alpha`` they are divided by; None leaves it out.
        both: try factors without the weights as well.
        alpha: the only exponent; None for any.
    """

    inputs: torch.Tensor
    weights: torch.Tensor | None
    both: bool = True
    alpha: float | None = None


@dataclass(frozen=True, slots=True, order=True)
class Exponent:
    """What factors are made of; the mildest comes first.

    Attributes:
        duo: they fall with the size of the weights too.
        step: ``alpha``, in steps.
    """

    duo: bool
    step: int


NONE = Exponent(duo=False, step=0)
"""All factors are one."""


def search_factors(trial: Trial, strength: Strength, alphas: int) -> torch.Tensor | None:
    """The factors of least output error, or None if none is better than leaving the weights as they are.

    Exponents are tried from coarse to fine: first a quarter of the way apart, then at ever half the distance on both
    sides of the best so far.

    Args:
        trial: judges factors.
        strength: what factors are made of.
        alphas: steps of the exponent between 0 and 1.
    """
    if strength.alpha is not None:
        return candidate(strength.inputs, strength.weights, strength.alpha)
    errors: dict[Exponent, float] = {}

    def factors(exponent: Exponent) -> torch.Tensor:
        return candidate(strength.inputs, strength.weights if exponent.duo else None, exponent.step / alphas)

    def judge(wanted: Iterable[Exponent]) -> None:
        new = sorted({each for each in wanted if 0 <= each.step <= alphas} - errors.keys())
        found = numbers(trial([factors(each) for each in new]).nan_to_num(torch.inf)) if new else ()
        errors.update(zip(new, found, strict=True))

    distance = max(1, alphas // 4)
    families = [
        *([False] if strength.both or strength.weights is None else []),
        *[True][: strength.weights is not None],
    ]
    judge(Exponent(duo, step) for duo in families for step in {*range(0, alphas + 1, distance), alphas})
    judge([NONE])
    while distance > 1:
        distance //= 2
        best = _least({each: error for each, error in errors.items() if each.duo in families})
        judge(Exponent(best.duo, best.step + side) for side in (-distance, distance))
    best = _least(errors)
    return None if best == NONE else factors(best)


def _least(errors: Mapping[Exponent, float]) -> Exponent:
    """The exponent of least error; of several that are as good the mildest."""
    bound = min(errors.values()) * (1 + TIE)
    return min((each for each, error in errors.items() if error <= bound), default=NONE)


@dataclass(frozen=True, slots=True)
class Sample:
    """Some rows of layers of one scheme, and how many each of them stands for."""

    weight: torch.Tensor
    scheme: Scheme
    stands_for: int


def sampled(members: Sequence[tuple[torch.Tensor, Scheme]]) -> list[Sample]:
    """Some rows of the layers that read an input, evenly spaced over all of them.

    Where scales reach over rows, whose groups a choice of rows would cut, a layer comes whole.

    Args:
        members: float32 ``[out_features, in_features]`` and the scheme of each layer.
    """
    step = max(1, sum(weight.shape[0] for weight, _ in members) // SEARCH_ROWS)
    stacked: dict[Scheme, list[torch.Tensor]] = {}
    whole, start = [], 0
    for weight, scheme in members:
        if scheme.stacks:
            stacked.setdefault(scheme, []).append(weight[start::step])
            start = (start - weight.shape[0]) % step
        else:
            whole.append(Sample(weight, scheme, 1))
    return [*(Sample(torch.cat(parts), scheme, step) for scheme, parts in stacked.items()), *whole]
