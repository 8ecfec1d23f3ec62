"""What is alive while a block is tuned: inputs and targets, a step's activations, weights with their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.lines import Line, written
from quantkit.estimation.use import Use
from quantkit.methods.tuning import TuneOptions
from quantkit.schemes import Scheme

STREAMS = 4
"""Hidden states of a token that wait: what a block is given and what it gives, in this model and in the float one."""
OF_HIDDEN, OF_HEADS, OF_WIDE = 16, 4, 6
"""Numbers that the backward pass of a token in a block keeps, in widths of the residual stream, of all heads of queries
and of keys, and of the MLP; attention is computed in tiles."""
DECODED = 2
"""Weights' worth of float32: they are decoded at each step, and have gradients."""
CODES = 0.25
"""The same for the codes, which are held."""
STATES = 4
"""Numbers of a trained one: itself, its gradient, and two moments."""


def tuning_lines(
    anatomy: Anatomy, options: TuneOptions, schemes: Mapping[str, Scheme], use: Use, size: int
) -> Iterator[Line]:
    """What lies beside a loaded block while it is tuned.

    Args:
        anatomy: the model.
        options: of its tuning.
        schemes: of its quantized layers.
        use: calibration tokens.
        size: bytes of a number in the passes.
    """
    tokens, hidden = use.calibration_tokens, anatomy.hidden
    waiting = f"{tokens:,} tokens x {STREAMS} x {hidden:,} x {size} bytes"
    yield Line("inputs and targets of the block", tokens * STREAMS * hidden * size, waiting)
    step = step_tokens(options, tokens)
    heads = anatomy.queries + anatomy.keys
    numbers = OF_HIDDEN * hidden + OF_HEADS * heads + OF_WIDE * anatomy.wide
    kept = f"{step:,} tokens x ({OF_HIDDEN} x {hidden:,} + {OF_HEADS} x {heads:,} + {OF_WIDE} x {anatomy.wide:,})"
    yield Line("activations of a step", step * numbers * size, f"{kept} x {size} bytes")
    weights, scales = _counts(anatomy, schemes)
    what = f"({DECODED} + {CODES:g}) x {written(weights)} weights x 4 bytes"
    yield Line("weights and their gradients", round((DECODED + CODES) * weights * 4), what)
    yield Line("trained parameters", STATES * scales * 4, f"{STATES} x {written(scales)} scales x 4 bytes")


def step_tokens(options: TuneOptions, tokens: int) -> int:
    """Tokens of a step, which takes one of several batches.

    Args:
        options: of the tuning.
        tokens: of all rows.
    """
    from quantkit.quantization.walk_variants import FEWEST_BATCHES

    return max(1, min(options.batch_tokens, tokens // FEWEST_BATCHES))


def _counts(anatomy: Anatomy, schemes: Mapping[str, Scheme]) -> tuple[int, int]:
    """Weights and scales of the quantized layers of the largest block."""
    linears, weights, scales = anatomy.linears(), 0, 0
    for name in dict.fromkeys(name for each in anatomy.inputs for name in each.layers):
        if name in schemes:
            rows, columns = linears[name][0]
            weights += rows * columns
            scales += rows * schemes[name].groups(columns)
    return weights, scales
