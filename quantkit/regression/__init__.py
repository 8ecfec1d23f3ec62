"""Regression checks: this run beside the accepted one, judged by the recipe's gates.

:class:`Check` is what a check found and what reports of it are rendered from; :func:`read_check` reads the
``check.json`` of a run. What carries out a check is in :mod:`quantkit.regression.check`.
"""

from __future__ import annotations

from quantkit.regression.document import (
    CHECK_FILE,
    SCHEMA,
    Change,
    Check,
    LayerShift,
    Metric,
    Reference,
    TextShift,
    TokenExample,
    Trend,
    TrendPoint,
    VariantState,
    WindowShift,
    read_check,
    write_check,
)

__all__ = [
    "CHECK_FILE",
    "SCHEMA",
    "Change",
    "Check",
    "LayerShift",
    "Metric",
    "Reference",
    "TextShift",
    "TokenExample",
    "Trend",
    "TrendPoint",
    "VariantState",
    "WindowShift",
    "read_check",
    "write_check",
]
