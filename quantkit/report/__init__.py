"""The report: what someone chooses a variant by, as JSON, Markdown and HTML, with its gates."""

from __future__ import annotations

from quantkit.gates import check_gate_syntax, evaluate_gates
from quantkit.report.files import load, render_again, write
from quantkit.report.mixes import mix_lines
from quantkit.report.recommendation import recommend
from quantkit.report.rounding import noted, rounding_lines
from quantkit.report.terminal import table

__all__ = [
    "check_gate_syntax",
    "evaluate_gates",
    "load",
    "mix_lines",
    "noted",
    "recommend",
    "render_again",
    "rounding_lines",
    "table",
    "write",
]
