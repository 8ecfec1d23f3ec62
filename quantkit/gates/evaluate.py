"""The gates that a run can judge by itself: those with a number, and those relative to its float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.gates.absolute import absolute_verdict, texts_of
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
    verdicts = []
    for gate in map(parse_gate, gates):
        texts = texts_of(gate, variants)
        if gate.kind == "absolute":
            verdicts += [absolute_verdict(gate, variant, texts) for variant in variants]
        elif gate.kind == "baseline":
            verdicts += [_beside_baseline(gate, variant, baseline or {}, texts) for variant in variants]
    return verdicts


def _beside_baseline(
    gate: Gate, variant: Mapping[str, Any], baseline: Mapping[str, Any], texts: Sequence[str]
) -> dict[str, Any]:
    from quantkit.gates.relative import judge_relative
    from quantkit.run_history.rows import variant_record

    result = judge_relative(gate, variant_record(variant), variant_record(baseline), texts)
    worst = result.worst
    return {
        "gate": gate.text,
        "variant": result.variant,
        "value": None if worst is None or worst.outcome == "unknown" else worst.value,
        "passed": result.outcome == "passed",
        "reason": result.reason,
        "difference": worst and worst.difference,
        "low": worst and worst.low,
        "high": worst and worst.high,
        "detectable": worst and worst.detectable,
    }
