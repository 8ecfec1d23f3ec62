"""Every figure of a run beside the accepted run's, and over the last runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantkit.gates import noise
from quantkit.gates.compare import compare, why_not
from quantkit.gates.metrics import METRICS
from quantkit.gates.metrics import Metric as About
from quantkit.gates.noise import Spread
from quantkit.gates.record import Key, VariantRecord
from quantkit.regression.document import Metric, Trend, TrendPoint
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
_PLAIN = About()


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
            yield Trend(now.name, _path(metric, figure), key[1] or None, about.unit, about.lower_is_better, points)


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
