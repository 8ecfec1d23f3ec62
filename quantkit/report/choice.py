"""The headline of a report, for someone who has to choose: the variant to take, the closest, and the smallest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.report.columns import Record
from quantkit.report.losses import apart, loss, meets_gates, size_words
from quantkit.report.mixes import mixed_words
from quantkit.report.numbers import figure
from quantkit.report.recommendation import breakage, recommend

SAME_SIZE = 1.0005
"""Files whose sizes differ by less are of one size: headers and scales written as text vary by some bytes."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the headline: a question, the variant that answers it, and its figures."""

    label: str
    name: str
    detail: str
    aside: str = ""


def findings(report: Record) -> list[Finding]:
    """The headline: the variant to take, which loses least, which is smallest, the smallest that meets all gates."""
    done = [variant for variant in report["variants"] if variant.get("status") == "ok"]
    if not done:
        return []
    found = [_recommended(report), _closest(report, done), _smallest(report, done, "Smallest")]
    if report.get("gates"):
        passing = [variant for variant in done if meets_gates(report, variant)]
        label = "Smallest that meets every gate"
        found.append(_smallest(report, passing, label) or Finding(label, "none", "No variant meets every gate"))
    return [finding for finding in found if finding is not None]


def _recommended(report: Record) -> Finding:
    found = recommend(report)
    broken = "; ".join(f"{name} ({how})" for name, how in found.broken.items())
    aside = f"Broken: {broken}." if broken else ""
    if found.variant is None:
        return Finding("Recommended", "none", found.reason.rstrip("."), aside)
    return Finding("Recommended", found.variant, found.figures, f"{found.reason} {aside}".strip())


def _closest(report: Record, variants: Sequence[Record]) -> Finding | None:
    losses = [(distance, variant) for variant in variants if (distance := loss(report, variant)) is not None]
    if not losses:
        return None
    least, best = min(losses, key=lambda pair: pair[0].value)
    near = [str(variant["name"]) for other, variant in losses if variant is not best and not apart(least, other)]
    aside = f"Within two standard errors of the difference: {', '.join(near)}." if near else ""
    detail = f"{least.words}{size_words(report, best, '; ')}{mixed_words(best)}"
    return Finding("Loses least", str(best["name"]), detail, aside)


def _smallest(report: Record, variants: Sequence[Record], label: str) -> Finding | None:
    sized = [(size, variant) for variant in variants if (size := figure(variant, "size_bytes")) is not None]
    if not sized:
        return None
    least = min(size for size, _ in sized)
    tied = [variant for size, variant in sized if size <= least * SAME_SIZE]
    ranked = [(distance.value if (distance := loss(report, variant)) else math.inf) for variant in tied]
    best = tied[ranked.index(min(ranked))]
    others = [str(variant["name"]) for variant in tied if variant is not best]
    asides = [f"Of the same size, and losing more: {', '.join(others)}."] if others else []
    how = breakage(report, best)
    asides += [f"It is broken: {how}."] if how else []
    distance = loss(report, best)
    words = f"; {distance.words}" if distance else ""
    return Finding(label, str(best["name"]), f"{size_words(report, best)}{words}{mixed_words(best)}", " ".join(asides))
