"""The comparison as a table for the terminal, and the verdicts of gates that were missed, in lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantkit.errors import RecipeError
from quantkit.gates import parse_gate
from quantkit.report.columns import Column, Record, build_columns, reference_name, scheme_name, texts_of
from quantkit.report.comparison import failure
from quantkit.report.numbers import ABSENT
from quantkit.report.recommendation import recommend
from quantkit.report.tasks_and_answers import further_columns
from quantkit.system.fitted_table import FittedTable, Shown

if TYPE_CHECKING:
    from rich.text import Text

MOST_FURTHER = 5
"""Figures of tasks and answers that the table has columns for by itself; the report shows more of them."""
NAME, FIRST, GATES, CHOICE, SCHEME, USUAL, OTHERS = range(7)
"""Ranks of columns: who it is; the figure that says whether it failed; gates; the choice; the rest."""
_OF_METRIC = {
    "perplexity": "perplexity",
    "kl_divergence.mean": "mean",
    "kl_divergence.median": "median",
    "kl_divergence.p99": "p99",
    "kl_divergence.stderr": "kl",
    "top1_agreement": "top1",
    "size_bytes": "size",
    "bits_per_weight": "bits",
    "memory.weights_bytes": "weights",
    "memory.peak_bytes": "peak",
    "speed.prefill_tokens_per_second": "prefill",
    "speed.decode_tokens_per_second": "decode",
    "seconds.quantize": "quantize",
    "seconds.evaluate": "evaluate",
}
"""Columns by what a gate is about."""
STYLES = {"recommended": "bold", "broken": "red"}


def table(report: dict[str, Any], *, everything: bool = False, errors_told: bool = False) -> FittedTable:
    """The comparison in short, fitted to the console: first what gates and the choice need, the best in green.

    A failed variant has a row that says so, and its error below the table unless that was told before.

    Args:
        report: the content of ``report.json``.
        everything: all figures, in further tables where they do not fit into one.
        errors_told: whoever reads it has seen why variants failed.
    """
    from rich.text import Text

    further = further_columns(report)
    columns = build_columns(report) | further
    ranks = _ranks(report, columns)
    errors = {str(row["name"]): error for row in report["variants"] if (error := failure(row)) is not None}
    notes = [Text(f"{name} failed: {error}", style="red") for name, error in errors.items() if not errors_told]
    who, scheme = _identities(report)
    shown = [Shown("Variant", who, NAME), Shown("Scheme", scheme, SCHEME)]
    for key in _ordered(report, columns):
        rank = ranks.get(key, OTHERS)
        if everything or rank < OTHERS:
            shown.append(_shown(key, columns[key], FIRST if len(shown) == 2 else rank, report, errors))
    title = f"{report['name']}, relative to {reference_name(report)}"
    return FittedTable(
        shown, title=title, notes=notes, everything=everything, remedy="--all-columns shows every figure"
    )


def gate_lines(report: Record) -> list[str]:
    """Each verdict of a gate with the figure that it rests on, those that were missed last.

    Of a variant that failed it is not said why again.
    """
    verdicts = sorted(report["gates"], key=lambda verdict: not verdict["passed"])
    failed = {row["name"] for row in report["variants"] if failure(row) is not None}
    return [
        f"gate {'passed' if verdict['passed'] else 'FAILED'}: {verdict['variant']}: {verdict['gate']}:"
        f" {'the variant failed' if verdict['variant'] in failed else verdict['reason']}"
        for verdict in verdicts
    ]


def _ranks(report: Record, columns: dict[str, Column]) -> dict[str, int]:
    """Ranks by key of the columns that are shown unless everything is asked for."""
    texts = texts_of(report)
    further = [key for key in columns if key.startswith("further:")]
    ranks = dict.fromkeys(further if len(further) <= MOST_FURTHER else [], USUAL)
    ranks |= dict.fromkeys(["ratio", "blocks", "server", "at_prefill", "estimate_ratio", "decode"], USUAL)
    ranks |= dict.fromkeys([f"{key}:{text}" for text in texts for key in ("mean", "perplexity")], CHOICE)
    ranks["size"] = CHOICE
    return ranks | dict.fromkeys(_gated(report, texts), GATES)


def _gated(report: Record, texts: list[str]) -> list[str]:
    """Keys of the columns that gates are about."""
    found = []
    for verdict in report.get("gates") or []:
        try:
            gate = parse_gate(str(verdict.get("gate")))
        except RecipeError:
            continue  # a report may come from elsewhere
        column = _OF_METRIC.get(gate.path)
        if column is None:
            found += [f"further:{gate.on}", f"further:{gate.metric}.{gate.on}"]  # answers bear the metric's name
        elif gate.about.per_text:
            found += [f"{column}:{text}" for text in ([gate.on] if gate.on else texts)]
        else:
            found.append(column)
    return found


def _ordered(report: Record, columns: dict[str, Column]) -> list[str]:
    """Keys of columns from left to right: size, loss on each text, then as they come."""
    first = ["size", "ratio", *(f"{key}:{text}" for text in texts_of(report) for key in ("mean", "perplexity"))]
    twins = {f"kl:{text}" for text in texts_of(report) if f"mean:{text}" in columns}
    found = [key for key in first if key in columns]
    return found + [key for key in columns if key not in found and (key not in twins or key in _gated(report, []))]


def _shown(key: str, column: Column, rank: int, report: Record, errors: dict[str, str]) -> Shown:
    """A column; of a failed variant the first one says so."""
    from rich.text import Text

    text = "" if key.startswith("further:") else key.partition(":")[2]
    cells = [Text(cell.text, style="bold green" if cell.best else "") for cell in column.cells]
    for index, variant in enumerate(report["variants"], start=1):
        if variant["name"] in errors:
            cells[index] = Text("failed" if rank == FIRST else "", style="red")
    return Shown(f"{column.title} {text}".strip(), cells, rank, number=True)


def _identities(report: Record) -> tuple[list[Text], list[Text]]:
    """Names, with what is recommended and what is broken marked, and schemes."""
    from rich.text import Text

    marks = recommend(report).marks()
    names, schemes = [Text(reference_name(report))], [Text(ABSENT)]
    for variant in report["variants"]:
        mark = marks.get(str(variant["name"]), "")
        name = f"{variant['name']}{f' ({mark})' if mark else ''}"
        names.append(Text(name, style=STYLES.get(mark, "")))
        schemes.append(Text(f"{variant.get('method') or ''} {scheme_name(variant)}".strip()))
    return names, schemes
