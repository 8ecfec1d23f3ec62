"""Which variants lose more than plain rounding to the same scheme, which costs nothing."""

from __future__ import annotations

from typing import Any

from quantkit.report.columns import Record
from quantkit.report.losses import apart, loss
from quantkit.report.numbers import decimals_for, fixed, margin, pick
from quantkit.schemes.mix import mix_of

ROUNDING = "rtn"
"""Name of the methods that round, of quantkit's and of the libraries'."""


def worse_than_rounding(report: Record) -> dict[str, str]:
    """By name, what shows that a variant loses more than the rounding of the same scheme in the report.

    On some text its divergence is the larger by more than two standard errors of the difference. Of several that round,
    it is compared with the one that loses least there.
    """
    rows = [row for row in report["variants"] if row.get("status") == "ok"]
    plain = [row for row in rows if _rounds(row)]
    found = {}
    for row in rows:
        peers = [other for other in plain if _schemes(other) == _schemes(row)]
        told = "" if _rounds(row) else "; ".join(filter(None, (_on(report, row, peers, text) for text in _texts(row))))
        if told:
            found[str(row["name"])] = told
    return found


def noted(report: dict[str, Any]) -> dict[str, Any]:
    """The report with what :func:`worse_than_rounding` says first among the notes of each variant that it names."""
    worse = worse_than_rounding(report)
    told = {name: f"worse than plain rounding: {how}" for name, how in worse.items()}
    rows = [
        row | {"notes": [told[row["name"]], *(row.get("notes") or [])]} if row["name"] in told else row
        for row in report["variants"]
    ]
    return {**report, "variants": rows}


def rounding_lines(report: Record) -> list[str]:
    """For a terminal."""
    return [f"worse than plain rounding: {name}: {how}" for name, how in worse_than_rounding(report).items()]


def _rounds(row: Record) -> bool:
    return str(row.get("method")).split(" ")[-1] == ROUNDING


def _schemes(row: Record) -> tuple[object, object]:
    """The scheme, and of a mix the choices."""
    mix = mix_of(row.get("allocation"))
    return row.get("scheme"), None if mix is None else mix.choices


def _texts(row: Record) -> list[str]:
    return list(pick(row, "metrics", "kl_divergence") or {})


def _on(report: Record, row: Record, plain: list[Record], text: str) -> str:
    """The divergence of a row beside that of the best of those that round; empty where it is not the larger."""
    own = loss(report, row, text)
    others = [(found, str(other["name"])) for other in plain if (found := loss(report, other, text)) is not None]
    if own is None or not own.stderr or not others:
        return ""
    best, name = min(others, key=lambda pair: pair[0].value)
    if not best.stderr or not apart(best, own):
        return ""
    places = decimals_for([own.stderr, best.stderr], digits=1, most=7)
    mine = f"{fixed(own.value, places)} {margin(own.stderr, places)}"
    theirs = f"{fixed(best.value, places)} {margin(best.stderr, places)}"
    return f"KL divergence {mine} on {text}, where {name} has {theirs}"
