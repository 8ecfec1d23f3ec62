"""The content of a check's pages as text: rows of tables, the same in HTML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.gates.results import GateResult, Outcome
from quantkit.regression.document import (
    Change,
    Check,
    Drift,
    LayerShift,
    Metric,
    TextShift,
    Trend,
    WindowShift,
)
from quantkit.regression.pages.trend import KINDS, TrendPanel, build_trend
from quantkit.regression.pages.words import (
    VERDICTS,
    detectable,
    figure,
    interval,
    moment,
    run_name,
    share,
    worse_by,
)
from quantkit.report.numbers import ABSENT, duration

AREAS = {
    "model": "Model",
    "calibration": "Calibration",
    "evaluation": "Evaluation",
    "recipe": "Recipe",
    "package": "Package",
    "environment": "Environment",
    "file": "File",
}
CONTEXT_SHOWN = 120
"""Characters of a token's context at most."""


@dataclass(frozen=True, slots=True)
class Whisker:
    """A difference with its interval on a line from better to worse, as shares of the line's length."""

    zero: float
    allowed: float
    low: float
    high: float
    value: float
    outcome: str


@dataclass(frozen=True, slots=True)
class GateRow:
    """A gate on a variant."""

    gate: str
    variant: str
    outcome: str
    verdict: str
    figure: str
    on: str
    beside: str
    worse: str
    interval: str
    detectable: str
    reason: str
    whisker: Whisker | None


@dataclass(frozen=True, slots=True)
class TextRows:
    """A text that got worse."""

    title: str
    before: str
    after: str
    worse: str
    windows: list[tuple[str, list[tuple[str, str, str, str, str]]]]


def context(check: Check) -> dict[str, Any]:
    """All that the templates ask for."""
    panels = _panels(check)
    gated = {(gate.variant, gate.metric) for gate in check.gates}
    return {
        "check": check,
        "verdict": VERDICTS[check.verdict],
        "verdicts": VERDICTS,
        "run": run_name(check.run),
        "facts": _facts(check),
        "gates": [gate_row(gate) for gate in check.gates],
        "counts": _counts(check.gates),
        "changes": [change_row(change) for change in check.changes],
        "metrics": _by_variant(check.metrics),
        "drifts": [drift_row(drift) for drift in check.drifts],
        "kinds": KINDS,
        "drawn": any(panel.model for _, panel in panels),
        "layers": [layer_row(layer) for layer in check.layers],
        "texts": [text_rows(text) for text in check.texts],
        "trends": [panel for key, panel in panels if key in gated],
        "further_trends": [panel for key, panel in panels if key not in gated],
        "failed": [(variant.name, variant.error or "") for variant in check.variants if variant.status != "ok"],
    }


def gate_row(gate: GateResult) -> GateRow:
    """A gate with the comparison that decided."""
    worst = gate.worst
    return GateRow(
        gate=gate.gate,
        variant=gate.variant,
        outcome=gate.outcome,
        verdict=VERDICTS[gate.outcome],
        figure=ABSENT if worst is None else figure(worst.value, gate.unit),
        on=(worst.text or "") if worst else "",
        beside=ABSENT if worst is None else figure(worst.reference, gate.unit),
        worse=ABSENT if worst is None else worse_by(gate, worst),
        interval=ABSENT if worst is None or gate.kind == "absolute" else interval(worst.low, worst.high, worst.noise),
        detectable=ABSENT if worst is None or gate.kind == "absolute" else detectable(worst),
        reason=gate.reason,
        whisker=_whisker(gate),
    )


def change_row(change: Change) -> list[str]:
    """Area, key, before, after, and the variants that it is about."""
    area = AREAS.get(change.area, change.area)
    return [area, change.key, change.before or ABSENT, change.after or ABSENT, ", ".join(change.variants) or "all"]


def metric_row(metric: Metric) -> list[str]:
    """Figure, accepted, now, difference, interval, and whether it is real."""
    name = metric.metric + (f" on {metric.text}" if metric.text else "")
    before, after = figure(metric.before, metric.unit), figure(metric.after, metric.unit)
    if metric.reason:
        return [name, before, after, ABSENT, ABSENT, metric.reason]
    real = {True: "real", False: "within its noise", None: "noise not known"}[metric.real]
    return [name, before, after, share(metric.difference), interval(metric.low, metric.high), real]


def layer_row(layer: LayerShift) -> list[str]:
    """Layer, variant, scheme, error before and after, and their ratio."""
    same = layer.scheme_before == layer.scheme_after
    schemes = [scheme or "not quantized" for scheme in (layer.scheme_before, layer.scheme_after)]
    return [
        layer.layer,
        layer.variant,
        schemes[1] if same else f"{schemes[0]} → {schemes[1]}",
        figure(layer.before, ""),
        figure(layer.after, ""),
        ABSENT if layer.ratio is None else f"{layer.ratio:.3g} times",
    ]


def text_rows(text: TextShift) -> TextRows:
    """A text with its windows, and of each the tokens that are furthest from the float model."""
    unit = "nats" if text.metric.startswith("kl") else ""
    return TextRows(
        title=f"{text.variant} on {text.text}: {text.metric}",
        before=figure(text.before, unit),
        after=figure(text.after, unit),
        worse=f"{share(text.difference)} ({interval(text.low, text.high)})",
        windows=[(_window(window), _tokens(window)) for window in text.windows],
    )


def _facts(check: Check) -> list[tuple[str, str]]:
    run = "not recorded" if check.run is None else str(check.run)
    facts = [("Run", run), ("Begun", moment(check.started))]
    facts += [("Took", duration(check.seconds)), ("Scored on", check.device), ("quantkit", check.quantkit)]
    grouped: dict[str, list[str]] = {}
    for reference in check.references:
        words = f"run {reference.run} of {moment(reference.started)}, accepted {moment(reference.accepted)}"
        grouped.setdefault(words, []).append(reference.variant)
    facts += [(f"Beside ({', '.join(variants)})", words) for words, variants in grouped.items()]
    return facts


def _counts(gates: Sequence[GateResult]) -> str:
    found = [(VERDICTS[outcome], sum(gate.outcome == outcome for gate in gates)) for outcome in VERDICTS]
    return ", ".join(f"{number} {words}" for words, number in found if number)


def _by_variant(metrics: Sequence[Metric]) -> list[tuple[str, list[list[str]]]]:
    names = dict.fromkeys(metric.variant for metric in metrics)
    return [(name, [metric_row(metric) for metric in metrics if metric.variant == name]) for name in names]


def _panels(check: Check) -> list[tuple[tuple[str, str], TrendPanel]]:
    """The plots, each with the variant and metric that gates know it by; the variant is named where there are some."""
    several = len({trend.variant for trend in check.trends}) > 1
    found = [(trend, build_trend(trend, named=several, outcome=_outcome(check, trend))) for trend in check.trends]
    return [((trend.variant, trend.metric), panel) for trend, panel in found if panel is not None]


def _outcome(check: Check, trend: Trend) -> Outcome | None:
    """What the gates about a figure found in this run, the worst; on its own text where it has one."""
    gates = [gate for gate in check.gates if (gate.variant, gate.metric) == (trend.variant, trend.metric)]
    outcomes = [
        outcome
        for gate in gates
        for text, outcome in ([(each.text, each.outcome) for each in gate.comparisons] or [(None, gate.outcome)])
        if text in (None, trend.text)
    ]
    order: tuple[Outcome, ...] = ("regressed", "unknown", "passed")
    return next((outcome for outcome in order if outcome in outcomes), None)


def drift_row(drift: Drift) -> list[str]:
    """Variant, figure, what it moved by, the float model's part with its interval, and quantization's."""
    name = drift.metric + (f" on {drift.text}" if drift.text else "")
    known = drift.low is not None and drift.high is not None
    own = share(drift.model) + (f" ({interval(drift.low, drift.high)})" if known else "")
    return [drift.variant, name, share(drift.file), own, share(drift.quantization)]


def _whisker(gate: GateResult) -> Whisker | None:
    """The line of a relative gate; None where there is no interval."""
    worst = gate.worst
    if worst is None or gate.kind == "absolute" or worst.difference is None or worst.low is None or worst.high is None:
        return None
    reach = 1.15 * max(abs(worst.low), abs(worst.high), abs(gate.allowed), 1e-9)

    def place(value: float) -> float:
        return (value + reach) / (2 * reach)

    return Whisker(
        zero=place(0.0),
        allowed=place(gate.allowed),
        low=place(worst.low),
        high=place(worst.high),
        value=place(worst.difference),
        outcome=gate.outcome,
    )


def _window(window: WindowShift) -> str:
    return f"window {window.window}: {figure(window.before, 'nats')} → {figure(window.after, 'nats')} per token"


def _tokens(window: WindowShift) -> list[tuple[str, str, str, str, str]]:
    """Context, the text's token, what the float model and the file expect there, and the divergence."""
    return [
        (
            _tail(token.context),
            token.token,
            token.expected,
            token.predicted,
            figure(token.divergence, "nats"),
        )
        for token in window.tokens
    ]


def _tail(text: str) -> str:
    return text if len(text) <= CONTEXT_SHOWN else f"…{text[-CONTEXT_SHOWN:]}"
