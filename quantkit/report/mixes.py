"""Mixes beside the rest of a report: predicted beside measured loss, and what others lose at the same size.

Everything is by text and of the KL divergence, which is what an allocation predicts.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from quantkit.report.columns import Record, texts_of
from quantkit.report.losses import is_other_merge
from quantkit.report.numbers import ABSENT, decimals_for, figure, fixed, in_bytes, margin, padded, percent, significant
from quantkit.schemes.mix import Mix, mix_of

Measured = tuple[float, float, str]
"""Size in bytes, loss on a text in nats a token, and name of a variant."""
SAME, NEAR = 1.0005, 1.01
"""Ratios of sizes up to which files are of one size, and up to which one stands for the other's size and it is said."""
HOLDS = (0.5, 2.0)
"""Between which ratios of measured to predicted loss a prediction is said to hold."""
ORDERED = 0.9
"""Rank correlation from which on the order is said to hold."""
FEWEST = 3
"""Mixes of which the order is told."""


@dataclass(frozen=True, slots=True)
class Other:
    """What variants whose schemes were given lose at a size.

    Attributes:
        loss: nats a token.
        words: which they are.
    """

    loss: float
    words: str


@dataclass(frozen=True, slots=True)
class Beside:
    """A mix on a text.

    Attributes:
        name: its variant.
        size: bytes of the file.
        loss, stderr: measured, nats a token.
        predicted: the same as the allocation has it, or None.
        other: what others lose at its size; None where none is near.
    """

    name: str
    size: float
    loss: float
    stderr: float | None
    predicted: float | None
    other: Other | None

    @property
    def ratio(self) -> float | None:
        """Measured to predicted loss."""
        return self.loss / self.predicted if self.predicted else None

    @property
    def share(self) -> float | None:
        """Its loss to that of the others."""
        return None if self.other is None else self.loss / self.other.loss

    @property
    def cells(self) -> list[str]:
        """Size, loss, predicted loss, their ratio, the others' loss, the ratio to it, who they are."""
        places = decimals_for([self.stderr], digits=2, most=6) if self.stderr else 5
        spread = f" {margin(self.stderr, places)}" if self.stderr else ""
        return [
            in_bytes(self.size),
            f"{fixed(self.loss, places)}{spread}",
            padded(self.predicted),
            _times(self.ratio),
            padded(self.other.loss) if self.other else ABSENT,
            _times(self.share),
            self.other.words if self.other else "none near in size",
        ]


@dataclass(frozen=True, slots=True)
class MixTable:
    """The mixes on a text, by size."""

    text: str
    rows: Sequence[Beside]


TITLES = (
    *("Mix", "Size", "KL divergence", "Predicted", "Measured / predicted"),
    *("Others at its size", "Mix / others", "Which"),
)


def mixes_of(report: Record) -> dict[str, Mix]:
    """The mixes of a report by name of the variant, finished ones alone."""
    found = {str(row["name"]): mix_of(row.get("allocation")) for row in _done(report)}
    return {name: mix for name, mix in found.items() if mix is not None}


def families(report: Record) -> list[list[str]]:
    """Names of mixes that differ in nothing but their budget, of two and more."""
    groups: dict[str, list[str]] = {}
    for row in _done(report):
        if mix_of(row.get("allocation")) is not None:
            keys = [row.get("method"), row.get("format"), row.get("options"), row["allocation"].get("choices")]
            groups.setdefault(json.dumps(keys, sort_keys=True, default=str), []).append(str(row["name"]))
    return [names for names in groups.values() if len(names) > 1]


def without_mixes(report: Record) -> Record:
    """The report without its mixes."""
    mixes = mixes_of(report)
    return {**report, "variants": [row for row in report["variants"] if row["name"] not in mixes]}


def mix_tables(report: Record) -> list[MixTable]:
    """The mixes by text; none where no divergence was measured."""
    mixes, found = mixes_of(report), []
    for text in texts_of(report) if mixes else ():
        given, rows = others_on(report, text), []
        for row in _done(report):
            name, size, loss = str(row["name"]), figure(row, "size_bytes"), _loss(row, text)
            if name in mixes and size is not None and loss is not None:
                stderr = figure(row, "metrics", "kl_divergence", text, "stderr")
                rows.append(Beside(name, size, loss, stderr, mixes[name].predicted, others_at(given, size)))
        if rows:
            found.append(MixTable(text, sorted(rows, key=lambda row: (row.size, row.name))))
    return found


def others_on(report: Record, text: str) -> list[Measured]:
    """The variants whose schemes were given, that were not trained afterwards, by size."""
    found = []
    for row in _done(report):
        size, loss = figure(row, "size_bytes"), _loss(row, text)
        if row.get("method") == "none" or row.get("original") or is_other_merge(report, row):
            continue
        if size and loss is not None and loss > 0 and mix_of(row.get("allocation")) is None:
            found.append((size, loss, str(row["name"])))
    return sorted(found)


def others_at(given: Sequence[Measured], size: float) -> Other | None:
    """What variants whose schemes were given lose at a size, by those that none of them beats.

    Between two sizes the logarithm of the loss is interpolated. Nothing is said beyond the smallest and the largest
    file, but for sizes that differ by less than :data:`NEAR`.

    Args:
        given: see :func:`others_on`.
        size: bytes.
    """
    front = [one for one in given if not any(other[:2] < one[:2] and other[1] <= one[1] for other in given)]
    for low, high in pairwise(front):
        if low[0] * SAME < size and size * SAME < high[0]:
            part = (size - low[0]) / (high[0] - low[0])
            value = math.exp((1 - part) * math.log(low[1]) + part * math.log(high[1]))
            return Other(value, f"between {low[2]} and {high[2]}")
    if not front:
        return None
    if size > front[-1][0] * NEAR and given[-1][0] * SAME >= size:
        return Other(front[-1][1], f"{front[-1][2]}, smaller, and what is larger loses more")
    alike = [one for one in front if max(one[0] / size, size / one[0]) <= SAME]
    nearest = min(alike, key=lambda one: one[1]) if alike else min(front, key=lambda one: abs(math.log(one[0] / size)))
    ratio = max(nearest[0] / size, size / nearest[0])
    if ratio > NEAR:
        return None
    off = f", {percent(ratio - 1)} {'larger' if nearest[0] > size else 'smaller'}" if ratio > SAME else ""
    return Other(nearest[1], f"{nearest[2]}{off}")


def mix_sentences(tables: Sequence[MixTable]) -> list[str]:
    """What the tables say: of each text, and then what it means where predicted and measured are apart."""
    found = [sentence for table in tables for sentence in _of_text(table)]
    ratios = [row.ratio for table in tables for row in table.rows if row.ratio is not None]
    orders = [order for table in tables if (order := rank_correlation(table.rows)) is not None]
    if ratios:
        found.append(_meaning(ratios, orders))
    return found


def rank_correlation(rows: Sequence[Beside]) -> float | None:
    """Spearman's, of predicted and measured losses; None of fewer than :data:`FEWEST`, or where all are alike."""
    known = [(row.predicted, row.loss) for row in rows if row.predicted is not None]
    if len(known) < FEWEST:
        return None
    ranks = [_ranks(list(values)) for values in zip(*known, strict=True)]
    if any(len(set(each)) == 1 for each in ranks):
        return None
    return statistics.correlation(*ranks)


def mixed_words(row: Record) -> str:
    """What stands behind a variant's figures where its schemes are mixed, such as ``; mixed int3, int4``."""
    mix = mix_of(row.get("allocation"))
    return "" if mix is None else f"; {mix.name}"


def beside_words(report: Record, row: Record) -> str:
    """What others lose at the size of a mix, as a sentence with a space before it; empty where nothing is near."""
    found = [
        f"{_times(line.share)} of it on {table.text}"
        for table in mix_tables(report)
        for line in table.rows
        if line.name == row["name"] and line.share is not None
    ]
    return f" Beside what others lose at its size: {', '.join(found)}." if found else ""


def mix_lines(report: Record) -> list[str]:
    """For a terminal."""
    found = [f"{name}: {mix.words}" for name, mix in mixes_of(report).items()]
    return found + mix_sentences(mix_tables(report))


def _of_text(table: MixTable) -> list[str]:
    found = []
    shares = [row.share for row in table.rows if row.share is not None]
    if shares:
        lose = f"{table.rows[0].name} loses" if len(table.rows) == 1 else "the mixes lose"
        those = "" if len(shares) == len(table.rows) else f" ({len(shares)} of {len(table.rows)} have others near)"
        found.append(f"On {table.text} {lose} {_range(shares)} of what others lose at the same size{those}.")
    ratios = [row.ratio for row in table.rows if row.ratio is not None]
    if ratios:
        order = rank_correlation(table.rows)
        ranked = "" if order is None else f"; rank correlation {fixed(order, 2)} of {len(ratios)} mixes"
        found.append(f"On {table.text} the measured loss is {_range(ratios)} times the predicted{ranked}.")
    return found


def _meaning(ratios: Sequence[float], orders: Sequence[float]) -> str:
    ordered = all(order >= ORDERED for order in orders)
    if HOLDS[0] <= min(ratios) and max(ratios) <= HOLDS[1] and ordered:
        return "The predictions hold, and so does the choice that rests on them."
    why = (
        "Predicted and measured loss are apart. A prediction adds up what errors of single layers cost on tokens of "
        "the calibration set; where bits are few errors add to each other, and a text unlike that set minds other "
        "layers."
    )
    if not orders:
        return f"{why} The choice may still be right: it needs the order of the costs alone."
    if ordered:
        return f"{why} Their order holds, which is all that the choice needs."
    return (
        f"{why} Their order does not hold everywhere: mixes that lose alike change places by chance, otherwise the "
        "choice is worth doubting, and calibrating on text like that which is scored would mend it."
    )


def _times(value: float | None) -> str:
    """A ratio."""
    return fixed(value, 2) if value is None or value < 10 else significant(value)


def _range(values: Sequence[float]) -> str:
    least, most = _times(min(values)), _times(max(values))
    return least if least == most else f"{least} to {most}"


def _done(report: Record) -> list[Record]:
    return [row for row in report["variants"] if row.get("status") == "ok"]


def _loss(row: Record, text: str) -> float | None:
    return figure(row, "metrics", "kl_divergence", text, "mean")


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1; values that are alike share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]
