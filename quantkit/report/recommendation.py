"""The recommendation of a report: the one variant to take, why, and which variants are broken.

Size is exchanged for loss at a fixed price. The usual knee, the point furthest from the line between both ends of the
curve, moves with whatever else was tried: a useless variant at one end makes a bad one look good. A price does not, and
it knows two variants apart where there is no curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quantkit.errors import RecipeError
from quantkit.gates import parse_gate
from quantkit.report.columns import Record
from quantkit.report.losses import apart, frontier, is_other_merge, loss, meets_gates, size_words
from quantkit.report.mixes import beside_words, mixed_words
from quantkit.report.numbers import figure, in_bytes, percent, pick, significant

PRICE = 0.5
"""Nats per token that the whole size of the float model is worth: a tenth of it 0.05, or 5 % of perplexity.
4 bits that lose less than about 0.1 nats are preferred to 8 bits, as most people do, and others are not."""
BROKEN = 0.4
"""Nats per token, of divergence or of rise in log perplexity (by half), from which on a variant is called broken."""
Why = Literal["knee", "budget", "only", "none"]
SERVER = ("server", "bytes_with_device")
"""Where a row has what a server would hold."""
_SIZES = ("size_bytes", "bits_per_weight", "memory")


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to take.

    Attributes:
        variant: its name; None where nothing can be recommended.
        why: ``budget``, the least loss that fits what the user said; ``knee``, the best exchange of size for loss;
            ``only``, nothing else is left to choose from; ``none``.
        reason: in words.
        figures: its loss and size in words; empty where nothing is recommended.
        broken: of each broken variant what shows it, in words.
    """

    variant: str | None
    why: Why
    reason: str
    figures: str
    broken: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As in ``report.json``."""
        return {
            "variant": self.variant,
            "why": self.why,
            "reason": self.reason,
            "figures": self.figures,
            "broken": dict(self.broken),
        }

    def marks(self) -> dict[str, str]:
        """What stands beside a variant's name: ``recommended`` or ``broken``."""
        found = dict.fromkeys(self.broken, "broken")
        return found if self.variant is None else {**found, self.variant: "recommended"}

    def lines(self) -> list[str]:
        """For a terminal."""
        head = f"recommended: {self.variant or 'none'}"
        told = f"{head} ({self.figures})" if self.figures else head
        return [told, f"  {self.reason}", *(f"broken: {name}: {how}" for name, how in self.broken.items())]


def recommend(report: Record) -> Recommendation:
    """The variant to take: whole, scored, not broken, within all gates and the budget, and the best of those."""
    candidates = [row for row in report["variants"] if row.get("status") == "ok" and not is_other_merge(report, row)]
    broken = {str(row["name"]): how for row in candidates if (how := breakage(report, row)) is not None}
    budget = _budget(report)
    steps: list[tuple[Callable[[Record], bool], str]] = [
        (lambda row: True, "No variant was made and scored."),
        (lambda row: row["name"] not in broken, "Every variant is broken."),
        (
            lambda row: loss(report, row) is not None and figure(row, "size_bytes") is not None,
            "No loss was measured: kl_divergence or perplexity in evaluation.metrics tells it.",
        ),
        (lambda row: not report.get("gates") or meets_gates(report, row), "No variant meets every gate."),
        (lambda row: all(fits(row) for fits in budget.values()), f"No variant fits {_listed(budget)}."),
    ]
    before = candidates
    for keeps, otherwise in steps:
        left = [row for row in before if keeps(row)]
        if not left:
            return Recommendation(None, "none", otherwise + _nearest(report, before), "", broken)
        before = left
    why, chosen, reason = _best(report, before, [*budget, *_size_gates(report)])
    told = reason + beside_words(report, chosen)
    return Recommendation(str(chosen["name"]), why, told, _figures(report, chosen), broken)


def breakage(report: Record, variant: Record) -> str | None:
    """What shows that a variant is broken, in words; None if nothing does."""
    found: list[tuple[float, str]] = []
    for text, value in (pick(variant, "metrics", "perplexity") or {}).items():
        base, given = figure(report, "baseline", "metrics", "perplexity", text), figure({"value": value}, "value")
        if base and given is None:
            found.append((math.inf, f"perplexity on {text} is not finite"))
        elif base and given and math.log(given / base) >= BROKEN:
            found.append((math.log(given / base), f"perplexity +{percent(given / base - 1, 0)} on {text}"))
    if found:
        return max(found)[1]
    divergences = pick(variant, "metrics", "kl_divergence") or {}
    values = [(value, text) for text in divergences if (value := figure(divergences, text, "mean")) is not None]
    worst, text = max(values, default=(0.0, ""))
    return f"KL divergence {significant(worst)} nats per token on {text}" if worst >= BROKEN else None


def _best(report: Record, rows: Sequence[Record], limits: Sequence[str]) -> tuple[Why, Record, str]:
    if len(rows) == 1:
        left = len(report["variants"]) > 1
        return "only", rows[0], "Nothing else is whole and within all limits." if left else "It is the only variant."
    if limits:
        return "budget", *least_loss(report, rows, _listed(limits))
    chosen = min(rows, key=lambda row: (_price(report, row), figure(row, "size_bytes")))
    return "knee", chosen, f"The best exchange of size for loss.{_neighbours(report, rows, chosen)}"


def least_loss(report: Record, rows: Sequence[Record], limits: str) -> tuple[Record, str]:
    """The row of least loss, or the smallest of those that cannot be told from it, and why.

    Args:
        report: with the float model that they are compared with.
        rows: whole and scored.
        limits: within which they are, in words.
    """
    losses = [(found, row) for row in rows if (found := loss(report, row)) is not None]
    least, best = min(losses, key=lambda pair: pair[0].value)
    alike = [row for found, row in losses if row is not best and not apart(least, found)]
    smallest = min([best, *alike], key=lambda row: figure(row, "size_bytes") or math.inf)
    reason = f"The least loss that fits {limits}."
    if smallest is not best:
        reason += f" {best['name']} loses no less that could be told, and is larger."
    return smallest, reason


def _nats(report: Record, row: Record) -> float:
    """The loss of a row in nats per token, on its worst text."""
    found = loss(report, row)
    if found is None:
        return math.inf
    return max(0.0, found.value if found.diverges else math.log1p(found.value))


def _price(report: Record, row: Record) -> float:
    whole = figure(report, "baseline", "size_bytes") or max(
        figure(each, "size_bytes") or 1 for each in report["variants"]
    )
    return PRICE * (figure(row, "size_bytes") or math.inf) / whole + _nats(report, row)


def _neighbours(report: Record, rows: Sequence[Record], chosen: Record) -> str:
    """What the next smaller and the next larger variant would change, of those than which none is better in both."""
    names = frontier({**report, "variants": list(rows)})
    by_name = {str(row["name"]): row for row in rows}
    if chosen["name"] not in names:
        return ""
    place, told = names.index(str(chosen["name"])), ""
    if place > 0:
        saved, lost = _differences(report, chosen, by_name[names[place - 1]])
        told += f" {names[place - 1]} would save {in_bytes(saved)} and lose {_nats_words(lost)} more."
    if place + 1 < len(names):
        taken, gained = _differences(report, by_name[names[place + 1]], chosen)
        told += f" {names[place + 1]} would take {in_bytes(taken)} more and lose {_nats_words(gained)} less."
    return told


def _differences(report: Record, larger: Record, smaller: Record) -> tuple[float, float]:
    sizes = [figure(row, "size_bytes") or 0.0 for row in (larger, smaller)]
    return sizes[0] - sizes[1], _nats(report, smaller) - _nats(report, larger)


def _nats_words(value: float) -> str:
    return f"{significant(value, 2)} nats per token"


def _figures(report: Record, row: Record) -> str:
    found = loss(report, row)
    return f"{found.words if found else ''}{size_words(report, row, '; ')}{mixed_words(row)}"


def _nearest(report: Record, rows: Sequence[Record]) -> str:
    """The smallest of what was left before nothing was, for somebody who asked for too much."""
    sized = [(size, row) for row in rows if (size := figure(row, "size_bytes")) is not None]
    if not sized:
        return ""
    _, row = min(sized, key=lambda pair: pair[0])
    return f" The smallest, {row['name']}: {_figures(report, row)}."


def _budget(report: Record) -> dict[str, Callable[[Record], bool]]:
    """What the recipe's section ``budget`` allows, each limit in words with what asks whether a row is within it."""
    given = pick(report, "recipe", "budget") or {}
    found: dict[str, Callable[[Record], bool]] = {}
    for key, path, words in (("size", ("size_bytes",), "on disk"), ("memory", SERVER, "of a server's memory")):
        limit = figure(given, key)
        if limit is not None:
            found[f"{in_bytes(limit)} {words}"] = _within(path, limit)
    return found


def _within(path: tuple[str, ...], limit: float) -> Callable[[Record], bool]:
    return lambda row: (value := figure(row, *path)) is not None and value <= limit


def _size_gates(report: Record) -> list[str]:
    """Gates by which the user said how large a variant may be."""
    found: dict[str, None] = {}
    for verdict in report.get("gates") or []:
        try:
            gate = parse_gate(str(verdict.get("gate")))
        except RecipeError:
            continue  # a report may come from elsewhere
        if gate.kind == "absolute" and gate.metric in _SIZES and gate.comparison.startswith("<"):
            found[gate.text] = None
    return list(found)


def _listed(limits: Sequence[str] | Mapping[str, Any]) -> str:
    return " and ".join(limits)
