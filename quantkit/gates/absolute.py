"""Judge gates with a number of their own, on rows of a report.

Where a metric is taken on several texts and the gate names none, the worst text counts. A figure that is missing or
not finite never passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit.gates.syntax import Gate
from quantkit.run_history.record import VariantRecord

if TYPE_CHECKING:
    from quantkit.regression.document import Comparison, GateResult


def absolute_verdict(gate: Gate, variant: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """The verdict of an absolute gate on a variant.

    Args:
        gate: an absolute one.
        variant: as the report has it; a failed one fails.
        texts: that a gate without a text is about.

    Returns:
        ``gate``, ``variant``, ``value``, ``passed`` and ``reason``; ``value`` is None where there is no figure.
    """
    value, reason = _figure(gate, variant, texts)
    passed = value is not None and gate.holds(value)
    if value is not None:
        verb = "is" if passed else "is not"
        reason = f"{gate.write(value)}{reason} {verb} {gate.comparison} {gate.write(gate.bound)}"
    return {
        "gate": gate.text,
        "variant": str(variant.get("name")),
        "value": value,
        "passed": passed,
        "reason": reason,
    }


def judge_absolute(gate: Gate, record: VariantRecord, texts: Sequence[str]) -> GateResult:
    """The same for a check: a figure that is missing is ``unknown``, one beyond its bound ``regressed``."""
    from quantkit.gates.relative import gate_result

    wanted: Sequence[str | None] = ([gate.on] if gate.on else list(texts)) if gate.about.per_text else [None]
    return gate_result(gate, record.name, [_comparison(gate, record, text) for text in wanted])


def _comparison(gate: Gate, record: VariantRecord, text: str | None) -> Comparison:
    from quantkit.regression.document import Comparison

    value = record.figures.get((gate.metric, text or "", gate.figure or ""))
    on = f" on {text}" if text else ""
    if record.status != "ok" or value is None:
        why = (
            f"the variant failed: {record.error}" if record.status != "ok" else f"no finite figure for {gate.path}{on}"
        )
        return Comparison(text, "unknown", None, gate.bound, reason=why)
    holds = gate.holds(value)
    beyond = value - gate.bound if gate.comparison.startswith("<") else gate.bound - value
    verb = "is" if holds else "is not"
    reason = f"{gate.write(value)}{on} {verb} {gate.comparison} {gate.write(gate.bound)}"
    return Comparison(text, "passed" if holds else "regressed", value, gate.bound, beyond, noise="exact", reason=reason)


def texts_of(gate: Gate, variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts that any of the variants has a gate's metric of."""
    return sorted({text for variant in variants for text in _by_text(gate, variant)})


def _figure(gate: Gate, variant: Mapping[str, Any], texts: Sequence[str]) -> tuple[float | None, str]:
    """The figure that the gate is about, with the text it is of; or None and why there is none."""
    if variant.get("status") != "ok":
        return None, "the variant failed"
    if not gate.about.per_text:
        value = _number(variant.get(gate.metric), gate.figure)
        return value, "" if value is not None else f"no finite figure for {_path(gate.metric, gate.figure)}"
    found = _by_text(gate, variant)
    values: dict[str, float] = {}
    for text in texts if gate.on is None else [gate.on]:
        value = _number(found.get(text), gate.figure)
        if value is None:
            return None, f"no finite figure for {_path(gate.metric, text, gate.figure)}"
        values[text] = value
    if not values:
        return None, f"no finite figure for {_path(gate.metric, gate.figure)}"
    worst = gate.worst(values)
    note = "" if gate.on is not None else f" on {worst}" if len(values) == 1 else f" on {worst}, its worst text,"
    return values[worst], note


def _by_text(gate: Gate, variant: Mapping[str, Any]) -> Mapping[str, Any]:
    metrics = variant.get("metrics")
    found = metrics.get(gate.metric) if isinstance(metrics, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _number(found: Any, figure: str | None) -> float | None:
    value = found if figure is None else found.get(figure) if isinstance(found, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _path(*parts: str | None) -> str:
    return ".".join(part for part in parts if part)
