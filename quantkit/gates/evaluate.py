"""The gates that a run can judge by itself: those with a number, and those relative to its float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.gates.judge import judge_absolute, judge_relative
from quantkit.gates.record import variant_record
from quantkit.gates.results import GateResult
from quantkit.gates.syntax import Gate, parse_gate


def evaluate_gates(
    gates: Sequence[str], variants: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The verdict of every gate on every variant, gate by gate; gates relative to the accepted run are left out.

    Args:
        gates: the conditions.
        variants: as the report has them; a failed one fails all gates.
        baseline: the float model, as the report has it.

    Returns:
        For each pair ``{"gate", "variant", "value", "passed", "reason"}``; ``value`` is None where there is no figure,
        and then the gate is failed. Those relative to the float model have ``difference``, ``low``, ``high`` and
        ``detectable`` beside, shares of its figure.

    Raises:
        RecipeError: a gate cannot be read.
    """
    records = [variant_record(variant) for variant in variants]
    float_model = variant_record(baseline or {})
    results = []
    for gate in map(parse_gate, gates):
        texts = _texts_of(gate, variants)
        if gate.kind == "absolute":
            results += [judge_absolute(gate, record, texts) for record in records]
        elif gate.kind == "baseline":
            results += [judge_relative(gate, record, float_model, texts) for record in records]
    return [_verdict(result) for result in results]


def _texts_of(gate: Gate, variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts that any of the variants has a gate's metric of, whether or not it is a finite figure."""
    found = [(variant.get("metrics") or {}).get(gate.metric) or {} for variant in variants]
    return sorted({text for by_text in found if isinstance(by_text, Mapping) for text in by_text})


def _verdict(result: GateResult) -> dict[str, Any]:
    worst = result.worst
    about = {
        "gate": result.gate,
        "variant": result.variant,
        "value": None if worst is None or worst.outcome == "unknown" else worst.value,
        "passed": result.outcome == "passed",
        "reason": result.reason,
    }
    if result.kind == "absolute":
        return about
    return about | {key: worst and getattr(worst, key) for key in ("difference", "low", "high", "detectable")}
