"""The loop over the columns of a block, of the column solver and of the descent over codes, as one kernel by Triton.

Importing this needs triton; :mod:`quantkit.numerics.fused` does where it is there. A program has some rows of one
layer. It holds what is left to be quantized of all columns of the block, takes one column after another, and lets what
each lost change those after it. Nothing is read that some program writes, and a row is computed by itself, so that its
result depends on no other row and is the same every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

LIMITS = tl.constexpr(0)
"""Levels are whole numbers from ``low`` to ``high``."""
SHIFTED = tl.constexpr(1)
"""Levels are whole numbers from 0 to ``high``, each less ``low``, which may be any number."""
TABLE = tl.constexpr(2)
"""Levels are those of a table, which has the thresholds between them and then the levels, all ascending."""
FLOATS = tl.constexpr(3)
"""Levels are small floats: ``low`` is the power of two of the smallest that have all bits, ``high`` is the largest."""
WHOLE = tl.constexpr(12582912.0)
"""``1.5 * 2**23``: added to a number below ``2**22`` and taken away, it leaves a whole one, of two the even one."""
EXPONENT = tl.constexpr(0x7F800000)
"""The bits of a float32 that are its exponent."""
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
"""All of its bits but the sign."""


@triton.jit  # type: ignore[untyped-decorator]
def _nearest(values, low, high, table, entries, factor, KIND: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """The nearest levels of values in units of their scales; ``factor`` times a power of two rounds to its step."""
    if KIND == LIMITS:
        found = tl.minimum(tl.maximum(values, low), high)
        found = (found + WHOLE) - WHOLE
    elif KIND == SHIFTED:
        # rounded before it is clamped: a float zero may be far from the codes
        found = tl.minimum(tl.maximum(values + low, -1.0), high + 1.0)
        found = tl.minimum(tl.maximum((found + WHOLE) - WHOLE, 0.0), high) - low
    elif KIND == TABLE:
        above = tl.zeros_like(values).to(tl.int32)
        for place in range(entries - 1):
            above += (values > tl.load(table + place)).to(tl.int32)
        found = tl.load(table + (entries - 1) + above)
    else:
        magnitude = tl.minimum(tl.abs(values), high)
        power = (magnitude.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
        rounder = tl.maximum(power, low) * factor
        magnitude = (magnitude + rounder) - rounder
        sign = values.to(tl.int32, bitcast=True) & ~MAGNITUDE
        found = (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def columns_kernel(  # type: ignore[no-untyped-def]
    start,
    before,
    scales,
    low,
    high,
    table,
    push,
    levels,
    errors,
    rows,
    width,
    start_layer,
    start_column,
    scales_layer,
    scales_column,
    limits_layer,
    limits_column,
    push_layer,
    push_column,
    levels_layer,
    levels_column,
    errors_layer,
    errors_column,
    low_number,
    high_number,
    entries,
    factor,
    KIND: tl.constexpr,  # noqa: N803
    VARIES: tl.constexpr,  # noqa: N803
    DESCENDS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
):
    """Find the levels of a block of columns of some rows; see :func:`quantkit.numerics.fused.Loop.run`.

    Strides are in numbers; rows lie next to each other. ``WIDTH`` is a power of two of at least ``width``.
    """
    layer = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = places < rows
    columns = tl.arange(0, WIDTH)
    block = (columns < width)[:, None] & inside[None, :]
    left = tl.load(
        start + layer * start_layer + columns[:, None] * start_column + places[None, :], mask=block, other=0.0
    )
    for done in range(width):
        current = tl.sum(tl.where((columns == done)[:, None], left, 0.0), axis=0)
        scale = tl.load(scales + layer * scales_layer + done * scales_column + places, mask=inside, other=1.0)
        limits = layer * limits_layer + done * limits_column + places
        wanted = tl.div_rn(current, scale)
        found = layer * levels_layer + done * levels_column + places
        if DESCENDS:
            level = tl.load(before + found, mask=inside, other=0.0)
            wanted += level
        lowest = tl.load(low + limits, mask=inside, other=0.0) if VARIES else low_number
        highest = tl.load(high + limits, mask=inside, other=0.0) if VARIES and KIND == LIMITS else high_number
        nearest = _nearest(wanted, lowest, highest, table, entries, factor, KIND)
        error = (nearest - level) * scale if DESCENDS else current - nearest * scale
        tl.store(levels + found, nearest, mask=inside)
        tl.store(errors + layer * errors_layer + done * errors_column + places, error, mask=inside)
        ahead = (columns > done) & (columns < width)
        weights = tl.load(push + layer * push_layer + done * push_column + columns, mask=ahead, other=0.0)
        left -= weights[:, None] * error[None, :]
