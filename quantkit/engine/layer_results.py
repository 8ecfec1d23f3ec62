"""What of a solution is a layer's: its codes, what they lose, and what the model loses by that."""

from __future__ import annotations

from dataclasses import replace

import torch

from quantkit.engine.sensitivity import Sensitivity
from quantkit.engine.stacks import InputGroup, Stack
from quantkit.engine.tasks import LayerResult
from quantkit.errors import QuantizationError
from quantkit.methods.base import Solution
from quantkit.numerics.activation_rounding import searched_scale, static_scale
from quantkit.numerics.refine import row_errors
from quantkit.schemes import QuantizedWeight
from quantkit.schemes.rounding import INPUT_SCALE


def layer_result(
    name: str, solution: Solution, start: int, stop: int, stack: Stack, is_calibrated: bool
) -> LayerResult:
    """The part of a solution that is a layer's.

    Args:
        name: of the layer.
        solution: of the stack.
        start, stop: its rows of the stack.
        stack: what was solved as one.
        is_calibrated: the method asked for statistics.
    """
    group = stack.group
    energy = solution.energy[start:stop].sum().clamp_(min=torch.finfo(torch.float32).tiny)
    error = solution.error[start:stop].sum() / energy
    before = error if solution.error_before is None else solution.error_before[start:stop].sum() / energy
    notes = solution.notes
    if is_calibrated and group.statistics.is_empty():
        notes = (*notes, "no calibration token reached this layer: its inputs were taken as uncorrelated")
    tokens = group.statistics.tokens if is_calibrated else 0
    weight = with_input_scale(solution.weight.rows(start, stop), group, name)
    experts = group.experts if is_calibrated else ""
    return LayerResult(name, weight, error, before, tokens, notes, experts, stack.shares.get(name))


def with_input_scale(weight: QuantizedWeight, group: InputGroup, name: str) -> QuantizedWeight:
    """A weight with the static scale of its layer's inputs, where its scheme has one.

    Layers that share an input get the same, as servers need it of those that they load as one matrix.

    Raises:
        QuantizationError: nothing is known of the inputs.
    """
    rounding, known = weight.scheme.input_rounding, group.statistics
    if rounding is None or not rounding.static:
        return weight
    if known.abs_max is None:
        raise QuantizationError(
            f"{name}: no calibration token reached it, so that the static scale of its inputs is not known",
            "give more or other calibration records, keep the layer float with 'ignore', or round inputs as they come: "
            "activations: dynamic",
        )
    if rounding not in group.input_scales:
        largest, scale = known.abs_max.amax(), None
        if rounding.numbers == "int8" and known.sample is not None:
            scale = searched_scale(largest, known.sample, list(group.weights.values()), rounding)
        group.input_scales[rounding] = static_scale(largest, rounding) if scale is None else scale
    return replace(weight, parts={**weight.parts, INPUT_SCALE: group.input_scales[rounding]})


def judged(result: LayerResult, errors: torch.Tensor, stack: Stack, sensitivity: Sensitivity) -> LayerResult:
    """A result with what is known of the model's loss; of errors only where they are those of its own outputs.

    Where batches are held out, errors are those of the layer as it is stored on their tokens, each of which counts as
    much as the model minds errors there.
    """
    group, name = stack.group, result.name
    known = group.statistics
    if known.held_out:
        gram = known.held_out[name].gram
        missing = group.weights[name] - result.weight.dequantize(torch.float32)
        told = None if gram is None else row_errors(missing.T, gram)
        effective = None
    elif stack.statistics.is_empty():
        return result
    else:
        told = None if stack.statistics.gram is None else errors
        effective = None if known.evenness == 1 else known.effective_tokens
    if told is not None and name in group.factors:
        told = told / group.factors[name].square()
    if told is not None and name in group.mixed:
        told = told.mean().expand_as(told)
    nats = None if told is None else sensitivity.nats(name, told)
    return replace(result, nats=nats, effective_tokens=effective)
