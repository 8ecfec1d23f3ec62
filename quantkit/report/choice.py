"""The headline of a report, for someone who has to choose: the closest variant, the smallest, and those between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.report.columns import Record, reference_name
from quantkit.report.numbers import decimals_for, figure, fixed, in_bytes, margin, percent, pick, significant

SAME_SIZE = 1.0005
"""Files whose sizes differ by less are of one size: headers and scales written as text vary by some bytes."""


@dataclass(frozen=True, slots=True)
class Loss:
    """How far a variant is from the reference, on the text where it is furthest.

    Attributes:
        value: KL divergence in nats per token, or if nobody measured it the relative rise in perplexity.
        stderr: standard error of ``value``, if known.
        text: the text's name.
        words: the same, written.
    """

    value: float
    stderr: float | None
    text: str
    words: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the headline: a question, the variant that answers it, and its figures."""

    label: str
    name: str
    detail: str
    aside: str = ""


def findings(report: Record) -> list[Finding]:
    """The headline: which variant loses least, which is smallest, and which smallest one meets all gates."""
    done = [variant for variant in report["variants"] if variant.get("status") == "ok"]
    found = [_closest(report, done), _smallest(report, done, "Smallest")]
    if report.get("gates"):
        passing = [variant for variant in done if _meets_gates(report, variant)]
        label = "Smallest that meets every gate"
        found.append(_smallest(report, passing, label) or Finding(label, "none", "No variant meets every gate."))
    return [finding for finding in found if finding is not None]


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


def _closest(report: Record, variants: Sequence[Record]) -> Finding | None:
    losses = [(distance, variant) for variant in variants if (distance := loss(report, variant)) is not None]
    if not losses:
        return None
    least, best = min(losses, key=lambda pair: pair[0].value)
    near = [str(variant["name"]) for other, variant in losses if variant is not best and not _apart(least, other)]
    aside = f"Within two standard errors of the difference: {', '.join(near)}." if near else ""
    return Finding("Loses least", str(best["name"]), f"{least.words}{_size_words(report, best, '; ')}", aside)


def _smallest(report: Record, variants: Sequence[Record], label: str) -> Finding | None:
    sized = [(size, variant) for variant in variants if (size := figure(variant, "size_bytes")) is not None]
    if not sized:
        return None
    least = min(size for size, _ in sized)
    tied = [variant for size, variant in sized if size <= least * SAME_SIZE]
    ranked = [(distance.value if (distance := loss(report, variant)) else math.inf) for variant in tied]
    best = tied[ranked.index(min(ranked))]
    others = [str(variant["name"]) for variant in tied if variant is not best]
    aside = f"Of the same size, and losing more: {', '.join(others)}." if others else ""
    distance = loss(report, best)
    words = f"; {distance.words}" if distance else ""
    return Finding(label, str(best["name"]), f"{_size_words(report, best)}{words}", aside)


def _divergence(divergences: Record, text: str) -> Loss | None:
    value, stderr = figure(divergences, text, "mean"), figure(divergences, text, "stderr")
    if value is None:
        return None
    written = significant(value)
    if stderr:
        places = decimals_for([stderr], digits=1, most=7)
        written = f"{fixed(value, places)} {margin(stderr, places)}"
    where = f" on {text}" if len(divergences) == 1 else f" on {text}, its worst text"
    return Loss(value, stderr, text, f"KL divergence {written} nats per token{where}")


def _rise(report: Record, variant: Record, text: str) -> Loss | None:
    value = figure(variant, "metrics", "perplexity", text)
    base = figure(report, "baseline", "metrics", "perplexity", text)
    if value is None or not base:
        return None
    rise = value / base - 1
    sign = "+" if rise >= 0 else ""
    where = "" if len(variant["metrics"]["perplexity"]) == 1 else ", its worst text"
    return Loss(rise, None, text, f"perplexity {fixed(value, 2)} ({sign}{percent(rise, 2)}) on {text}{where}")


def _has_divergence(report: Record) -> bool:
    return any(pick(variant, "metrics", "kl_divergence") for variant in report["variants"])


def _apart(least: Loss, other: Loss) -> bool:
    if least.stderr is None or other.stderr is None:
        return True
    return other.value - least.value > 2 * math.hypot(least.stderr, other.stderr)


def _size_words(report: Record, variant: Record, prefix: str = "") -> str:
    size, whole = figure(variant, "size_bytes"), figure(report, "baseline", "size_bytes")
    if size is None:
        return ""
    share = f", {percent(size / whole)} of {reference_name(report)}" if whole else ""
    return f"{prefix}{in_bytes(size)}{share}"


def _meets_gates(report: Record, variant: Record) -> bool:
    verdicts = [gate for gate in report["gates"] if gate.get("variant") == variant["name"]]
    return bool(verdicts) and all(gate.get("passed") is True for gate in verdicts)
