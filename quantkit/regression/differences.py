"""Every figure of a run beside the accepted run's and over the last runs, and the layers and texts that moved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from quantkit.gates import noise
from quantkit.gates.compare import compare, why_not
from quantkit.gates.metrics import METRICS
from quantkit.gates.metrics import Metric as About
from quantkit.gates.noise import Spread
from quantkit.gates.record import (
    Key,
    LayerRecord,
    TextRecord,
    TokenRecord,
    VariantRecord,
)
from quantkit.regression.document import (
    Drift,
    LayerShift,
    Metric,
    TextShift,
    TokenExample,
    Trend,
    TrendPoint,
    WindowShift,
)
from quantkit.regression.judging import Beside, speed_spreads
from quantkit.run_history.record import RunRecord

RUNS_SHOWN = 30
TRENDS = (
    ("perplexity", ""),
    ("kl_divergence", "mean"),
    ("top1_agreement", ""),
    ("size_bytes", ""),
    ("memory", "weights_bytes"),
    ("speed", "decode_tokens_per_second"),
    ("speed", "prefill_tokens_per_second"),
    *((name, about.implied) for name, about in METRICS.items() if about.implied),
)
"""The figures that are shown over time, as metric and figure, in this order."""
DRIFTING = ("perplexity", "tasks", "task_losses", "answers", "speed")
"""Metrics of which the float model has figures of its own that move from run to run."""
Pair = tuple[VariantRecord, VariantRecord]
_PLAIN = About()
LAYERS_SHOWN = 20
TEXTS_SHOWN = 10
WINDOWS_SHOWN = 3
SMALLEST_MOVE = 0.05
"""Relative change of a layer's error from which on it is told."""


def metrics(run: RunRecord, beside: Beside) -> list[Metric]:
    """Every figure of the variants that have a reference."""
    return [
        _metric(key, now, then, speed_spreads(now, beside.earlier))
        for now in run.variants
        if now.status == "ok" and (then := beside.variant(now.name)) is not None
        for key in now.figures
        if _is_figure(key)
    ]


def trends(run: RunRecord, beside: Beside) -> list[Trend]:
    """The main figures over the last runs; those of other recipes' variants are not among them."""
    runs = [*beside.earlier[-(RUNS_SHOWN - 1) :], run]
    return [trend for now in run.variants if now.status == "ok" for trend in _trends(now, runs)]


def _is_figure(key: Key) -> bool:
    """Whether it is a figure of its own; a standard error or a count stands beside one."""
    metric, _, figure = key
    return metric not in METRICS or METRICS[metric].implied in ("", figure)


def _metric(key: Key, now: VariantRecord, then: VariantRecord, spreads: Mapping[str, Spread]) -> Metric:
    metric, text, figure = key
    about = METRICS.get(metric, _PLAIN)
    known = metric in METRICS
    found = compare(metric, figure or None, text or None, now, then, spreads) if known else "gates know nothing of it"
    told = noise.Difference(0.0) if isinstance(found, str) else found
    compared = not isinstance(found, str)
    return Metric(
        variant=now.name,
        metric=_path(metric, figure),
        text=text or None,
        unit=about.unit,
        before=then.figures.get(key),
        after=now.figures[key],
        difference=told.value if compared else None,
        low=told.low,
        high=told.high,
        real=None if told.low is None or told.high is None else told.low > 0 or told.high < 0,
        reason=found if isinstance(found, str) else "",
    )


def _trends(now: VariantRecord, runs: list[RunRecord]) -> Iterator[Trend]:
    for metric, figure in TRENDS:
        for key in sorted(key for key in now.figures if (key[0], key[2]) == (metric, figure)):
            about = METRICS[metric]
            points = tuple(point for run in runs if (point := _point(key, now, run)) is not None)
            yield Trend(
                now.name,
                _path(metric, figure),
                key[1] or None,
                about.unit,
                about.lower_is_better,
                points,
                _model(key, now, runs),
            )


def _model(key: Key, now: VariantRecord, runs: list[RunRecord]) -> tuple[float | None, ...]:
    """The float model's own figure in the runs that a trend has points of."""
    if METRICS[key[0]].versus_float:
        return ()
    there = [run for run in runs if _point(key, now, run) is not None]
    found = tuple(run.baseline.figures.get(key) if run.baseline is not None else None for run in there)
    return found if any(value is not None for value in found) else ()


def drifts(run: RunRecord, beside: Beside) -> list[Drift]:
    """The figures of variants that moved since the accepted run, beside the float model's own, the worst first."""
    found = [
        drift
        for now in run.variants
        if now.status == "ok" and (then := beside.variant(now.name)) is not None
        for key in now.figures
        if key[0] in DRIFTING
        and _is_figure(key)
        and (drift := _drift(key, (now, then), (run.baseline, beside.references[now.name].baseline))) is not None
    ]
    return sorted(found, key=lambda drift: -drift.file)


def _drift(key: Key, file: Pair, model: tuple[VariantRecord | None, VariantRecord | None]) -> Drift | None:
    """Of two files, now and then, beside two float models; None where it cannot be told, or nothing moved."""
    (metric, text, figure), (now, then) = key, model
    if now is None or then is None or not all(each.figures.get(key) for each in (*file, now, then)):
        return None
    of_file, of_model = (compare(metric, figure or None, text or None, *pair) for pair in (file, (now, then)))
    if isinstance(of_file, str) or isinstance(of_model, str):
        return None
    whole, own = (each[0].figures[key] / each[1].figures[key] for each in (file, (now, then)))
    sign = 1.0 if METRICS[metric].lower_is_better else -1.0
    moved, drifted, left = (sign * (ratio - 1) for ratio in (whole, own, whole / own))
    if moved == drifted == 0:
        return None
    path = _path(metric, figure)
    return Drift(file[0].name, path, text or None, drifted, of_model.low, of_model.high, moved, left)


def _point(key: Key, now: VariantRecord, run: RunRecord) -> TrendPoint | None:
    then = run.variant(now.name)
    if then is None or key not in then.figures:
        return None
    return TrendPoint(
        run=run.id,
        started=run.started,
        value=then.figures[key],
        stderr=then.figures.get((key[0], key[1], "stderr")),
        accepted=now.name in run.accepted,
        comparable=why_not(key[0], key[1] or None, now, then) is None,
        verdict=run.verdict,
    )


def _path(metric: str, figure: str) -> str:
    return f"{metric}.{figure}" if figure else metric


def layer_shifts(run: RunRecord, beside: Beside) -> list[LayerShift]:
    """The layers whose errors moved most, the worst first."""
    found = [
        shift
        for now in run.variants
        if now.status == "ok" and (then := beside.variant(now.name)) is not None
        for shift in _layers(now, then)
    ]
    largest = sorted(found, key=lambda shift: -_size(shift))[:LAYERS_SHOWN]
    return sorted(largest, key=lambda shift: -(shift.ratio or math.inf))


def text_shifts(run: RunRecord, beside: Beside) -> list[TextShift]:
    """The texts on which a variant got worse by more than its noise, the worst first."""
    found = [
        shift
        for now in run.variants
        if now.status == "ok" and (then := beside.variant(now.name)) is not None
        for text in now.texts
        if (shift := _text(text, now, then)) is not None
    ]
    return sorted(found, key=lambda shift: -shift.difference)[:TEXTS_SHOWN]


def _layers(now: VariantRecord, then: VariantRecord) -> Iterator[LayerShift]:
    here = {layer.name: layer for layer in now.layers}
    there = {layer.name: layer for layer in then.layers}
    for name in here | there:
        new, old = here.get(name), there.get(name)
        after, before = new.error_after if new else None, old.error_after if old else None
        ratio = after / before if after is not None and before else None
        moved = ratio is not None and abs(ratio - 1) > SMALLEST_MOVE
        if moved or _scheme(new) != _scheme(old):
            yield LayerShift(now.name, name, before, after, ratio, _scheme(old), _scheme(new))


def _scheme(layer: LayerRecord | None) -> str | None:
    return layer.scheme if layer else None


def _size(shift: LayerShift) -> float:
    return abs(math.log(shift.ratio)) if shift.ratio else math.inf


def _text(name: str, now: VariantRecord, then: VariantRecord) -> TextShift | None:
    figure = "mean" if now.texts[name].kl is not None else None
    metric = "perplexity" if figure is None else "kl_divergence"
    found = compare(metric, figure, name, now, then)
    if isinstance(found, str) or not found.is_worse:
        return None
    key = (metric, name, figure or "")
    return TextShift(
        variant=now.name,
        text=name,
        metric=metric,
        before=then.figures[key],
        after=now.figures[key],
        difference=found.value,
        low=found.low,
        high=found.high,
        windows=_windows(now.texts[name], then.texts[name]),
    )


def _windows(now: TextRecord, then: TextRecord) -> tuple[WindowShift, ...]:
    here, there = (now.kl, then.kl) if now.kl is not None and then.kl is not None else (now.nll, then.nll)
    apart = sorted(range(len(here)), key=lambda window: there[window] - here[window])[:WINDOWS_SHOWN]
    return tuple(
        WindowShift(
            window,
            there[window] / now.tokens_per_window,
            here[window] / now.tokens_per_window,
            tuple(_example(token) for token in now.departures if token.window == window),
        )
        for window in apart
        if here[window] > there[window]
    )


def _example(token: TokenRecord) -> TokenExample:
    return TokenExample(
        position=token.position,
        divergence=token.kl_divergence,
        nll=token.nll,
        context=token.context,
        token=token.token,
        expected=token.expected,
        predicted=token.predicted,
    )
