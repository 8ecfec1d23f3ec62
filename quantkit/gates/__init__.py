"""Gates: conditions that every variant must meet.

``kl_divergence.prose.mean <= 0.05`` holds a figure against a number, ``perplexity <= baseline +1%`` against the float
model, ``perplexity +1 %`` against the accepted run. The path leads into a variant of the report, with ``metrics.``
implied. What a run can judge by itself is judged by :func:`evaluate_gates`, the rest by a check.
"""

from __future__ import annotations

from quantkit.gates.evaluate import evaluate_gates
from quantkit.gates.metrics import METRICS, Metric
from quantkit.gates.syntax import Gate, check_gate_syntax, parse_gate

__all__ = ["METRICS", "Gate", "Metric", "check_gate_syntax", "evaluate_gates", "parse_gate"]
