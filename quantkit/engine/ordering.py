"""Solving a layer with its columns in the order of their inputs' strength, as schemes with ``desc_act`` ask for.

Groups then gather columns of like activation: GPTQ's order with groups cut after the sort, here for every method alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics, Method, Solution
from quantkit.schemes import IntScheme, QuantizedWeight, Scheme

Quantize = Callable[[torch.Tensor, InputStatistics, Scheme, torch.dtype], Solution]


def quantize_in_order(method: Method) -> Quantize:
    """:meth:`Method.quantize`, with the columns in the order that a scheme with ``desc_act`` asks for.

    The columns of the weight and of the statistics are put in order, the layer is solved with groups of neighbours, and
    its codes go back to their places. Besides what the method raises, what is returned raises QuantizationError where
    nothing is known of the inputs.
    """

    def quantize(
        weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        if not isinstance(scheme, IntScheme):
            raise TypeError(f"{scheme.describe()} orders no columns")
        order, ordered = _in_order(statistics, weight.shape[1], weight.device)
        solution = method.quantize(weight[:, order], ordered, replace(scheme, desc_act=False), scale_dtype)
        return replace(solution, weight=_unordered(solution.weight, order, scheme))

    return quantize


def _in_order(statistics: InputStatistics, columns: int, device: torch.device) -> tuple[torch.Tensor, InputStatistics]:
    """The columns with the strongest inputs first, and the statistics in that order; found once for each input."""
    if "desc_act" not in statistics.derived:
        strength = statistics.square_mean if statistics.gram is None else statistics.gram.diagonal()
        strength = statistics.abs_mean if strength is None else strength
        if strength is None and statistics.tokens:
            raise QuantizationError(
                "desc_act orders columns by their inputs, and the method asks for no calibration",
                "leave out desc_act, or use a method that is calibrated",
            )
        strength = torch.zeros(columns, device=device) if strength is None else strength
        order = strength.argsort(descending=True, stable=True)
        statistics.derived["desc_act"] = (order, _reordered(statistics, order))
    found: tuple[torch.Tensor, InputStatistics] = statistics.derived["desc_act"]
    return found


def _reordered(statistics: InputStatistics, order: torch.Tensor) -> InputStatistics:
    def column(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[order]

    gram = None if statistics.gram is None else statistics.gram[order][:, order]
    means = column(statistics.abs_mean), column(statistics.square_mean)
    return InputStatistics(statistics.tokens, *means, gram, evenness=statistics.evenness)


def _unordered(weight: QuantizedWeight, order: torch.Tensor, scheme: IntScheme) -> QuantizedWeight:
    """The weight with its columns where the model has them, and the group of each."""
    place = order.argsort()
    groups = (place // scheme.group_size).to(torch.int32)
    return replace(weight, scheme=scheme, codes=weight.codes[:, place], parts={**weight.parts, "g_idx": groups})
