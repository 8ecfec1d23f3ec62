"""The tables below the comparison, as rows of words for Markdown and HTML: gates, layers, lengths, loading."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from quantkit.formats import FORMATS
from quantkit.report.columns import Record
from quantkit.report.facts import words
from quantkit.report.numbers import ABSENT, MINUS, count, figure, in_bytes, padded, percent, pick, significant
from quantkit.system.units import finite

LAYERS_SHOWN = 15


@dataclass(frozen=True, slots=True)
class Layers:
    """A variant's layers, those with the largest error first.

    Attributes:
        total: how many it has.
        rows: of at most :data:`LAYERS_SHOWN` layers the name, scheme, error before, error after, change.
        refined: whether any layer has an error before.
    """

    total: int
    rows: list[tuple[str, str, str, str, str]]
    refined: bool


@dataclass(frozen=True, slots=True)
class GateTable:
    """Verdicts, variant by gate.

    Attributes:
        gates: the conditions.
        rows: a variant's name and for each gate ``(figure, passed)``.
        failures: variant, gate and reason of each failed verdict on a variant that did not itself fail.
        passed: how many variants meet every gate.
    """

    gates: list[str]
    rows: list[tuple[str, list[tuple[str, bool]]]]
    failures: list[tuple[str, str, str]]
    passed: int


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of the histogram of record lengths; ``share`` is of the highest bar."""

    label: str
    count: str
    share: float


def written_date(report: Record) -> str:
    """The date and time of the report, or what stands in its place if that is no date."""
    given = str(report.get("created") or "")
    try:
        moment = datetime.fromisoformat(given)
    except ValueError:
        return given
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".strip()


def histogram(report: Record) -> list[Bar]:
    """How long the calibration records are."""
    bins = [entry for entry in pick(report, "calibration", "length", "histogram") or [] if isinstance(entry, Mapping)]
    highest = max((figure(entry, "count") or 0.0 for entry in bins), default=0.0) or 1.0
    return [
        Bar(
            f"{count(entry.get('from'))}\N{EN DASH}{count(entry.get('to'))}",
            count(entry.get("count")),
            (figure(entry, "count") or 0.0) / highest,
        )
        for entry in bins
    ]


def worst_layers(variant: Record) -> Layers:
    """The layers of ``variant`` with the largest errors."""
    layers = [layer for layer in variant.get("layers") or [] if isinstance(layer, Mapping)]
    ranked = sorted(layers, key=lambda layer: -(figure(layer, "error_after") or 0.0))[:LAYERS_SHOWN]
    rows = []
    for layer in ranked:
        before, after = figure(layer, "error_before"), figure(layer, "error_after")
        change = ABSENT if not before or after is None else f"{100 * (after / before - 1):+.1f}%".replace("-", MINUS)
        name, scheme = words(layer.get("name")), words(layer.get("scheme"))
        rows.append((name, scheme, padded(before), padded(after), change))
    return Layers(len(layers), rows, any(row[2] != ABSENT for row in rows))


@dataclass(frozen=True, slots=True)
class Experts:
    """Calibration tokens by expert.

    Attributes:
        rows: of each layer with experts the name, how many, and of their tokens the least, median, most; how many of
            them saw fewer than they should, and how many that is.
        few: whether any did.
    """

    rows: list[tuple[str, ...]]
    few: bool


def experts(variant: Record) -> Experts:
    """How many calibration tokens reached the experts of each layer of ``variant``."""
    tables = [table for table in variant.get("experts") or [] if isinstance(table, Mapping)]
    rows = []
    for table in tables:
        tokens = [found for each in table.get("tokens") or [] if (found := finite(each)) is not None]
        spread = (min(tokens), statistics.median(tokens), max(tokens)) if tokens else (None, None, None)
        figures = (count(each) for each in (len(tokens), *spread, table.get("few"), table.get("wanted")))
        rows.append((words(table.get("name")), *figures))
    return Experts(rows, any(figure(table, "few") for table in tables))


def gate_table(report: Record) -> GateTable:
    """All verdicts of the report."""
    verdicts = report.get("gates") or []
    gates = list(dict.fromkeys(str(verdict["gate"]) for verdict in verdicts))
    names = list(dict.fromkeys(str(verdict["variant"]) for verdict in verdicts))
    by_pair = {(str(verdict["variant"]), str(verdict["gate"])): verdict for verdict in verdicts}
    rows = []
    for name in names:
        found = [by_pair.get((name, gate), {}) for gate in gates]
        rows.append((name, [(_gate_figure(verdict), verdict.get("passed") is True) for verdict in found]))
    done = {str(variant["name"]) for variant in report["variants"] if variant.get("status") == "ok"}
    failures = [
        (str(verdict["variant"]), str(verdict["gate"]), words(verdict.get("reason")))
        for verdict in verdicts
        if verdict.get("passed") is not True and str(verdict["variant"]) in done
    ]
    return GateTable(gates, rows, failures, sum(all(passed for _, passed in cells) for _, cells in rows))


def loading(report: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each format of a finished variant the commands that load its first checkpoint, by runtime."""
    first: dict[str, str] = {}
    for variant in report["variants"]:
        if variant.get("status") == "ok" and variant.get("checkpoint") and variant.get("format"):
            first.setdefault(str(variant.get("format")), str(variant["checkpoint"]))
    return [(name, _commands(name, folder)) for name, folder in first.items()]


def _class(folder: Path) -> str:
    """The class of transformers that loads a checkpoint; it is asked only where the config holds several models'."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if not any(isinstance(part, dict) and "model_type" in part for part in config.values()):
        return "AutoModelForCausalLM"
    from quantkit.checkpoint.model_class import class_name_in  # it brings torch along

    return class_name_in(folder)


def _commands(format_name: str, folder: str) -> list[tuple[str, str]]:
    runtimes = FORMATS.get(format_name).runtimes if format_name in FORMATS else ("transformers",)
    path, loads = json.dumps(folder, ensure_ascii=False), _class(Path(folder))
    known = {
        "transformers": f"from transformers import {loads}, AutoTokenizer\n\n"
        f"model = {loads}.from_pretrained({path})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({path})",
        "vllm": f"vllm serve {shlex.quote(folder)}",
    }
    return [(runtime, known[runtime]) for runtime in runtimes if runtime in known]


def _gate_figure(verdict: Mapping[str, Any]) -> str:
    value = finite(verdict.get("value"))
    path = str(verdict.get("gate", "")).removeprefix("metrics.")
    if value is None:
        return "no figure"
    if path.startswith(("size_bytes", "memory.")):
        return in_bytes(value)
    return percent(value) if path.startswith("top1_agreement") else significant(value, 4)
