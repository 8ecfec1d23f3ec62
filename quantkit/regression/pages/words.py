"""Figures and verdicts of a check in words, the same on every page."""

from __future__ import annotations

from quantkit.gates.judge import percent
from quantkit.gates.results import Comparison, GateResult
from quantkit.report.numbers import ABSENT, MINUS, fixed, in_bytes, significant

VERDICTS = {"passed": "passed", "regressed": "regressed", "unknown": "cannot be told"}
STYLES = {"passed": "good", "regressed": "bad", "unknown": "warn"}
"""The class of a verdict on the page."""


def figure(value: float | None, unit: str) -> str:
    """A figure in its unit."""
    if value is None:
        return ABSENT
    if unit == "bytes":
        return in_bytes(value)
    if unit == "share":
        return f"{fixed(100 * value, 2)} %"
    words = {"": "", "nats": " nats", "tokens/s": " tokens/s", "seconds": " s", "bits": " bits"}
    return significant(value, 5) + words.get(unit, f" {unit}")


def share(value: float | None) -> str:
    """A share with its sign, such as ``+1.2 %``."""
    if value is None:
        return ABSENT
    text = percent(abs(value))
    if text == "0 %":
        return text
    return f"+{text}" if value > 0 else f"{MINUS}{text}"


def interval(low: float | None, high: float | None, noise: str | None = None) -> str:
    """The 95 % interval of a difference."""
    if noise == "exact":
        return "exact"
    return "not known" if low is None or high is None else f"{share(low)} to {share(high)}"


def worse_by(result: GateResult, comparison: Comparison) -> str:
    """By how much a figure is worse than what it is held against."""
    if comparison.difference is None:
        return ABSENT
    if result.kind == "absolute":
        beyond = max(comparison.difference, 0.0)
        return "within" if not beyond else f"{figure(beyond, result.unit)} beyond"
    return share(comparison.difference)


def detectable(comparison: Comparison) -> str:
    """The smallest worsening that the data would have shown."""
    if comparison.noise == "exact":
        return "any"
    return ABSENT if comparison.detectable is None else share(comparison.detectable)


def moment(text: str) -> str:
    """A moment to the minute."""
    return f"{text[:16].replace('T', ' ')} UTC"


def run_name(run: int | None) -> str:
    """A run as people call it."""
    return "a run that could not be recorded" if run is None else f"run {run}"
