"""A check on the terminal: the verdict first, then what it rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.gates.judge import percent
from quantkit.gates.results import Comparison, GateResult
from quantkit.regression.document import Check
from quantkit.report.numbers import in_bytes
from quantkit.system.fitted_table import FittedTable, Shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.text import Text

STYLES = {"passed": "green", "regressed": "bold red", "unknown": "bold yellow"}
WORDS = {"passed": "passed", "regressed": "REGRESSED", "unknown": "CANNOT BE TOLD"}
_COLUMNS = (
    ("Gate", 0, False),
    ("Variant", 0, False),
    ("Verdict", 1, False),
    ("Figure", 2, True),
    ("Beside", 3, True),
    ("Worse by", 4, True),
    ("95 % interval", 5, True),
    ("Detectable", 6, True),
)
"""Titles of the columns of gates, the rank of each, and whether it is a number, which is never wrapped."""
CHANGES_SHOWN = 12
LAYERS_SHOWN = 5


def rendered(check: Check) -> RenderableType:
    """The verdict, the gates, what changed, and what got worse where."""
    from rich.console import Group
    from rich.text import Text

    number = "not recorded" if check.run is None else f"run {check.run}"
    head = Text.assemble((WORDS[check.verdict], STYLES[check.verdict]), f"  {check.name}, {number}\n", check.summary)
    lines = [Text(line) for line in _lines(check)]
    return Group(head, _gates(check), *lines)


def _gates(check: Check) -> FittedTable:
    """Verdicts with their figures, which the lines below have in words."""
    from rich.text import Text

    rows = [
        [Text(result.gate), Text(result.variant), _verdict(result), *map(Text, _figures(result))]
        for result in check.gates
    ]
    cells = list(zip(*rows, strict=True)) or [()] * len(_COLUMNS)
    shown = [Shown(title, column, rank, number) for (title, rank, number), column in zip(_COLUMNS, cells, strict=True)]
    return FittedTable(shown, remedy="check.json and the check's page have them")


def _verdict(result: GateResult) -> Text:
    from rich.text import Text

    return Text(WORDS[result.outcome], style=STYLES[result.outcome])


def _figures(result: GateResult) -> list[str]:
    worst = result.worst
    if worst is None:
        return ["", "", "", "", ""]
    on = f" {worst.text}" if worst.text else ""
    relative = result.kind != "absolute" and worst.difference is not None
    return [
        f"{_written(result, worst.value)}{on}",
        _written(result, worst.reference),
        percent(worst.difference or 0.0) if relative else "",
        _interval(worst) if relative else "",
        "" if worst.detectable is None or worst.noise == "exact" else percent(worst.detectable),
    ]


def _written(result: GateResult, value: float | None) -> str:
    if value is None:
        return "none"
    return in_bytes(value) if result.unit == "bytes" else f"{value:.5g}"


def _interval(comparison: Comparison) -> str:
    if comparison.noise == "exact":
        return "exact"
    if comparison.low is None or comparison.high is None:
        return "not known"
    return f"{percent(comparison.low)} to {percent(comparison.high)}"


def _lines(check: Check) -> Iterator[str]:
    gates: dict[str, list[str]] = {}
    for result in check.gates:
        if result.outcome != "passed":
            gates.setdefault(result.reason, []).append(f"{result.variant}: {result.gate}")
    for reason, about in gates.items():
        yield f"{about[0]}{f' and {len(about) - 1} more' if about[1:] else ''}: {reason}"
    for reference in check.references:
        yield f"{reference.variant} is beside run {reference.run} of {reference.started[:10]}"
    for change in check.changes[:CHANGES_SHOWN]:
        yield f"changed: {change.area} {change.key}: {change.before or 'none'} to {change.after or 'none'}"
    if len(check.changes) > CHANGES_SHOWN:
        yield f"changed: {len(check.changes) - CHANGES_SHOWN} more in check.json"
    for layer in check.layers[:LAYERS_SHOWN]:
        times = "" if layer.ratio is None else f", {layer.ratio:.3g} times the accepted error"
        yield f"layer {layer.layer} of {layer.variant}: {layer.scheme_after or 'not quantized'}{times}"
    for text in check.texts:
        yield f"worse on {text.text}: {text.variant}: {text.metric} {text.before:.4g} to {text.after:.4g}"
        for token in [token for window in text.windows for token in window.tokens][:1]:
            yield f"  ...{token.context[-60:]!r} then {token.token!r}: {token.expected!r} became {token.predicted!r}"
    for note in check.notes:
        yield f"note: {note}"
    for folder in check.removed:
        yield f"removed: {folder}"
