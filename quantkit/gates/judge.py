"""The verdict of a gate on a variant: beside a number, the float model, or the accepted run's file.

Where a metric is taken on several texts and the gate names none, the worst text counts. A figure that is missing or
not finite never passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from quantkit.gates.compare import compare
from quantkit.gates.noise import Difference, Spread
from quantkit.gates.record import VariantRecord
from quantkit.gates.results import Comparison, GateResult, Noise, Outcome
from quantkit.gates.syntax import Gate

WORST_FIRST = ("regressed", "unknown", "passed")
NOISE: dict[str | None, Noise | None] = {
    "likelihood": "windows",
    "divergence": "windows",
    "agreement": "windows",
    "timings": "timings",
    "stderr": "stderr",
    "exact": "exact",
}
RUNS_FOR_SPREAD = 5
"""Earlier runs from which on they tell how much speeds differ from run to run."""
_WHY_UNKNOWN: dict[str | None, str] = {
    "timings": f"how much that differs from run to run is known from {RUNS_FOR_SPREAD} earlier runs on",
    "stderr": "its standard error is not known",
}
_ONE_WINDOW = "whether by chance cannot be told from a single window"
_OTHER = {"baseline": "the float model's", "accepted": "the accepted run's"}


def judge_absolute(gate: Gate, record: VariantRecord, texts: Sequence[str]) -> GateResult:
    """The verdict of an absolute gate on a variant.

    A figure on the wrong side of the bound is ``regressed``, one that is missing ``unknown``.

    Args:
        gate: an absolute one.
        record: the variant.
        texts: that a gate without a text is about.
    """
    wanted = _texts(gate, texts)
    result = _result(gate, record.name, [_beside_number(gate, record, text) for text in wanted])
    worst = result.worst
    if worst is None or worst.value is None or len(wanted) < 2:
        return result
    return replace(result, reason=_beside_bound(gate, worst.value, f" on {worst.text}, its worst text,"))


def judge_relative(
    gate: Gate,
    now: VariantRecord,
    then: VariantRecord | None,
    texts: Sequence[str],
    *,
    absent: str = "",
    spreads: Mapping[str, Spread] | None = None,
) -> GateResult:
    """The verdict of a relative gate on a variant.

    A figure is worse than it may be if it is worse by more than the gate allows and the worsening lies outside its
    95 % interval of noise. What cannot be compared is ``unknown``.

    Args:
        gate: a relative one.
        now: the variant.
        then: what it is compared with; None where there is nothing, and ``absent`` says why.
        texts: that a gate without a text is about.
        absent: why there is nothing to compare with.
        spreads: see :func:`quantkit.gates.compare.compare`.
    """
    found = [_beside_another(gate, text, now, then, absent, spreads) for text in _texts(gate, texts)]
    return _result(gate, now.name, found)


def _texts(gate: Gate, texts: Sequence[str]) -> Sequence[str | None]:
    """The texts that a gate is about; None for a metric that is taken on no text."""
    if not gate.about.per_text:
        return [None]
    return [gate.on] if gate.on else texts


def _result(gate: Gate, variant: str, comparisons: Sequence[Comparison]) -> GateResult:
    """A gate's result from its comparisons: the worst counts, and comes first."""
    ranked = sorted(comparisons, key=_badness)
    return GateResult(
        gate=gate.text,
        variant=variant,
        kind=gate.kind,
        metric=gate.path,
        unit=gate.about.unit,
        lower_is_better=gate.about.lower_is_better,
        allowed=gate.bound if gate.kind == "absolute" else gate.allowed,
        outcome=ranked[0].outcome if ranked else "unknown",
        comparisons=tuple(ranked),
        reason=ranked[0].reason if ranked else f"no finite figure for {gate.path}",
    )


def _badness(comparison: Comparison) -> tuple[int, float]:
    return WORST_FIRST.index(comparison.outcome), -(comparison.difference or 0.0)


def _beside_number(gate: Gate, record: VariantRecord, text: str | None) -> Comparison:
    value = record.figures.get((gate.metric, text or "", gate.figure or ""))
    on = f" on {text}" if text else ""
    if record.status != "ok":
        why = f"the variant failed: {record.error}" if record.error else "the variant failed"
        return Comparison(text, "unknown", None, gate.bound, reason=why)
    if value is None:
        return Comparison(text, "unknown", None, gate.bound, reason=f"no finite figure for {gate.path}{on}")
    outcome: Outcome = "passed" if gate.holds(value) else "regressed"
    excess = value - gate.bound if gate.comparison.startswith("<") else gate.bound - value
    reason = _beside_bound(gate, value, on)
    return Comparison(text, outcome, value, gate.bound, excess, noise="exact", reason=reason)


def _beside_bound(gate: Gate, value: float, on: str) -> str:
    verb = "is" if gate.holds(value) else "is not"
    return f"{gate.write(value)}{on} {verb} {gate.comparison} {gate.write(gate.bound)}"


def _beside_another(
    gate: Gate,
    text: str | None,
    now: VariantRecord,
    then: VariantRecord | None,
    absent: str,
    spreads: Mapping[str, Spread] | None,
) -> Comparison:
    key = (gate.metric, text or "", gate.figure or "")
    value, reference = now.figures.get(key), None if then is None else then.figures.get(key)
    found = absent if then is None else compare(gate.metric, gate.figure, text, now, then, spreads)
    on = f" on {text}" if text else ""
    if isinstance(found, str):
        return Comparison(text, "unknown", value, reference, reason=found)
    outcome, verdict = _outcome(gate, found)
    where = f"{gate.write(value or 0.0)}{on} is {_worse(found)} {_OTHER[gate.kind]} {gate.write(reference or 0.0)}"
    return Comparison(
        text=text,
        outcome=outcome,
        value=value,
        reference=reference,
        difference=found.value,
        low=found.low,
        high=found.high,
        detectable=found.detectable,
        noise=None if found.low is None else NOISE[gate.about.spread],
        samples=found.samples,
        reason=f"{where}{verdict}",
    )


def _outcome(gate: Gate, found: Difference) -> tuple[Outcome, str]:
    allowed = f"{percent(gate.allowed)} is allowed" if gate.allowed else "nothing worse is allowed"
    if found.value <= gate.allowed:
        return "passed", f"{_interval(found)}; {allowed}"
    if found.low is None:
        return "unknown", f"; {_WHY_UNKNOWN.get(gate.about.spread, _ONE_WINDOW)}; {allowed}"
    if found.low > min(gate.allowed, 0.0):
        return "regressed", f"{_interval(found)}; {allowed}"
    least = "" if found.detectable is None else f"; from {percent(found.detectable)} on it would be found"
    return "passed", f"{_interval(found)}, which is inside its noise{least}; {allowed}"


def _worse(found: Difference) -> str:
    if found.value == 0:
        return "as good as"
    return f"{percent(abs(found.value))} {'worse' if found.value > 0 else 'better'} than"


def _interval(found: Difference) -> str:
    if found.low is None or found.high is None or found.low == found.high:
        return ""
    return f" ({percent(found.low)} to {percent(found.high)})"


def percent(share: float) -> str:
    """A share as messages show it."""
    return f"{100 * share:.3g} %"
