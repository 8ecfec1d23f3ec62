"""The loss of a variant: how far it is from the float model, and which variants nothing beats in size and loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantkit.report.columns import Record, reference_name
from quantkit.report.numbers import decimals_for, figure, fixed, in_bytes, margin, percent, pick, significant


@dataclass(frozen=True, slots=True)
class Loss:
    """How far a variant is from the reference, on the text where it is furthest.

    Attributes:
        value: KL divergence in nats per token, or if nobody measured it the relative rise in perplexity.
        stderr: standard error of ``value``, if known.
        text: the text's name.
        words: the same, written.
        diverges: ``value`` is a divergence and not a rise in perplexity.
    """

    value: float
    stderr: float | None
    text: str
    words: str
    diverges: bool


def loss(report: Record, variant: Record, text: str | None = None) -> Loss | None:
    """How far ``variant`` is from the reference on ``text``, or on its worst one."""
    divergences = pick(variant, "metrics", "kl_divergence") or {}
    losses = [_divergence(divergences, name) for name in divergences if text in (None, name)]
    if not _has_divergence(report):
        perplexities = pick(variant, "metrics", "perplexity") or {}
        losses = [_rise(report, variant, name) for name in perplexities if text in (None, name)]
    measured = [item for item in losses if item is not None]
    return max(measured, key=lambda item: item.value, default=None)


def frontier(report: Record, text: str | None = None) -> list[str]:
    """Names of the variants than which no other is both as small and as close, smallest first.

    Without a ``text``, each variant counts by its worst one.
    """
    points = []
    for variant in report["variants"]:
        size, distance = figure(variant, "size_bytes"), loss(report, variant, text)
        if variant.get("status") == "ok" and size is not None and distance is not None:
            points.append((size, distance.value, str(variant["name"])))
    best, kept = math.inf, []
    for _, value, name in sorted(points):
        if value < best:
            best = value
            kept.append(name)
    return kept


def apart(least: Loss, other: Loss) -> bool:
    """Whether two losses differ by more than two standard errors of their difference."""
    if least.stderr is None or other.stderr is None:
        return True
    return other.value - least.value > 2 * math.hypot(least.stderr, other.stderr)


def is_other_merge(report: Record, row: Record) -> bool:
    """Whether a row is no variant of the recipe but the float model merged into the other base."""
    other = pick(report, "recipe", "merge", "compare")
    return bool(other) and row["name"] == f"merged-{other}"


def meets_gates(report: Record, variant: Record) -> bool:
    """Whether a variant meets every gate."""
    verdicts = [gate for gate in report["gates"] if gate.get("variant") == variant["name"]]
    return bool(verdicts) and all(gate.get("passed") is True for gate in verdicts)


def size_words(report: Record, variant: Record, prefix: str = "") -> str:
    """The size of a variant, and its share of the reference's."""
    size, whole = figure(variant, "size_bytes"), figure(report, "baseline", "size_bytes")
    if size is None:
        return ""
    share = f", {percent(size / whole)} of {reference_name(report)}" if whole else ""
    return f"{prefix}{in_bytes(size)}{share}"


def _divergence(divergences: Record, text: str) -> Loss | None:
    value, stderr = figure(divergences, text, "mean"), figure(divergences, text, "stderr")
    if value is None:
        return None
    written = significant(value)
    if stderr:
        places = decimals_for([stderr], digits=1, most=7)
        written = f"{fixed(value, places)} {margin(stderr, places)}"
    where = f" on {text}" if len(divergences) == 1 else f" on {text}, its worst text"
    return Loss(value, stderr, text, f"KL divergence {written} nats per token{where}", True)


def _rise(report: Record, variant: Record, text: str) -> Loss | None:
    value = figure(variant, "metrics", "perplexity", text)
    base = figure(report, "baseline", "metrics", "perplexity", text)
    if value is None or not base:
        return None
    rise = value / base - 1
    sign = "+" if rise >= 0 else ""
    where = "" if len(variant["metrics"]["perplexity"]) == 1 else ", its worst text"
    return Loss(rise, None, text, f"perplexity {fixed(value, 2)} ({sign}{percent(rise, 2)}) on {text}{where}", False)


def _has_divergence(report: Record) -> bool:
    return any(pick(variant, "metrics", "kl_divergence") for variant in report["variants"])
