"""Solving groups of layers that share an input for a task: stacked, and alike groups together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch

from quantkit.engine.layer_results import judged, layer_result
from quantkit.engine.ordering import quantize_in_order
from quantkit.engine.sensitivity import Sensitivity
from quantkit.engine.stacks import InputGroup, Stack, fits, stacked, stacks_of
from quantkit.engine.tasks import LayerResult, VariantTask
from quantkit.errors import QuantizationError
from quantkit.methods.base import Method, Solution
from quantkit.numerics.mismatch import corrected
from quantkit.schemes import Scheme


def solve_groups(
    task: VariantTask,
    groups: Sequence[InputGroup],
    *,
    embedding: bool = False,
    sensitivity: Sensitivity | None = None,
) -> list[LayerResult]:
    """Solve the layers of groups that a task wants; those of one group and scheme are stacked and solved as one.

    Where a scheme does not stack, each layer is solved by itself. The method sees the statistics that it asks for and
    no others, whatever was gathered for other variants. What is alike in several groups is handed to it at once.

    Args:
        task: the variant.
        groups: several if they are alike.
        embedding: the group is the input embedding, which no calibration token is expected to reach.
        sensitivity: predicts what errors cost.

    Raises:
        QuantizationError: naming the layer.
    """
    method = task.method.for_embeddings() if embedding else task.method
    is_calibrated = bool(task.needs) and not embedding
    alike: dict[tuple[Scheme, torch.Size], list[Stack]] = {}
    for group in groups:
        asked = group.statistics.only(method.needs)
        for names, scheme in stacks_of(task, group.weights):
            stack = _corrected(Stack(names, stacked(group, names), asked, group), method)
            alike.setdefault((scheme, stack.weight.shape), []).append(stack)
        group.statistics.mismatch = None  # with the tokens that were held out it may be as large as a Gram matrix
    solved: list[LayerResult] = []
    for (scheme, _), stacks in alike.items():
        for stack, solution in zip(stacks, _solved(task, method, stacks, scheme), strict=True):
            start = 0
            for name in stack.names:
                stop = start + stack.group.weights[name].shape[0]
                result = layer_result(name, solution, start, stop, stack, is_calibrated)
                if sensitivity is not None:
                    result = judged(result, solution.error[start:stop], stack, sensitivity)
                solved.append(result)
                start = stop
    return solved


def _corrected(stack: Stack, method: Method) -> Stack:
    """The stack as it makes up for what its input lost, where that is known and the method asks for it."""
    found = stack.group.statistics
    if not method.corrects or found.mismatch is None or found.gram is None:
        return stack
    sizes = [len(stack.group.weights[name]) for name in stack.names]
    # beside its own tokens an expert has others' in its Gram matrix, for which it has nothing to make up
    gram = found.gram if found.own == 1 else found.gram / found.own
    weight, shares = corrected(stack.weight, sizes, gram, found.mismatch)
    return replace(stack, weight=weight, shares=dict(zip(stack.names, shares, strict=True)))


def _solved(task: VariantTask, method: Method, stacks: Sequence[Stack], scheme: Scheme) -> list[Solution]:
    """The solutions of stacks that are alike; where one cannot be solved they are solved one by one, to name it."""
    dtype = task.scale_dtype
    together = fits(stacks[0].weight, sum(each.weight.numel() for each in stacks))
    if len(stacks) > 1 and not scheme.orders_columns and together:
        with suppress(QuantizationError):
            return method.quantize_alike([(each.weight, each.statistics) for each in stacks], scheme, dtype)
    solve = quantize_in_order(method) if scheme.orders_columns else method.quantize
    return [_named(task, each, partial(solve, each.weight, each.statistics, scheme, dtype)) for each in stacks]


def _named(task: VariantTask, stack: Stack, solve: Callable[[], Solution]) -> Solution:
    """A solution; its error names the layer."""
    try:
        return solve()
    except QuantizationError as error:
        raise QuantizationError(f"{task.name}: {stack.names[0]}: {error.problem}", error.remedy) from error
