"""A figure over the last runs, laid out as a plot and as a line of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.gates.results import Outcome
from quantkit.regression.document import Trend, TrendPoint
from quantkit.regression.pages.words import figure, moment, run_name
from quantkit.report.axes import Axis, Frame, linear_axis
from quantkit.report.numbers import byte_unit

WIDTH, HEIGHT = 380.0, 176.0
"""Narrow enough for a phone, where its text is then nearly as large as that beside it."""
FRAME = Frame(58.0, 12.0, WIDTH - 10.0, HEIGHT - 30.0)
LABELS = 7
"""Runs whose numbers stand below the plot at most."""
KINDS = {
    "now": "this run",
    "bad": "this run, in which this figure regressed",
    "accepted": "accepted, with its level as a broken line",
    "regressed": "a run that regressed, on this figure or another",
    "plain": "another run",
    "other": "other data or another device, not comparable",
}
"""What a mark says of its run."""
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Mark:
    """A run in a plot, in pixels; ``kind`` is one of :data:`KINDS`."""

    x: float
    y: float
    bar: tuple[float, float] | None
    kind: str
    tip: str


@dataclass(frozen=True, slots=True)
class TrendPanel:
    """The plot of one figure.

    Attributes:
        title: what it shows.
        caption: the newest figure, and which way is better.
        outcome: of the gates about it, worst first: ``regressed``, ``unknown`` or ``passed``; None without any.
        marks: oldest first.
        line: through the runs that may stand beside the newest one.
        model: where the float model's own drift alone would have taken the figure; empty where it has none.
        level: pixel of the accepted run's figure; None where there is none.
        x_ticks, y_ticks: pixels and labels.
    """

    title: str
    caption: str
    outcome: Outcome | None
    marks: list[Mark]
    line: list[tuple[float, float]]
    model: list[tuple[float, float]]
    level: float | None
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: float = WIDTH
    height: float = HEIGHT
    frame: Frame = FRAME


def build_trend(trend: Trend, *, named: bool = True, outcome: Outcome | None = None) -> TrendPanel | None:
    """The plot of a figure; None where it was taken in one run alone.

    Args:
        trend: the figure.
        named: tell the variant's name.
        outcome: of the gates about it in the newest run.
    """
    points = trend.points
    if len(points) < 2:
        return None
    unit, divisor = byte_unit([point.value for point in points]) if trend.unit == "bytes" else (trend.unit, 1)
    across = _across(len(points))
    drift = _drift(trend)
    axis = _axis(points, list(drift.values()), divisor)
    marks = [
        _mark(trend, point, place, axis, divisor, _kind(point, outcome, newest=point is points[-1]))
        for point, place in zip(points, across, strict=True)
    ]
    accepted = [point for point in points if point.accepted and point.comparable]
    better = "lower" if trend.lower_is_better else "higher"
    return TrendPanel(
        title=(f"{trend.variant}: " if named else "") + _title(trend, unit),
        caption=f"now {figure(points[-1].value, trend.unit)}, {better} is better",
        outcome=outcome,
        marks=marks,
        line=[(mark.x, mark.y) for mark, point in zip(marks, points, strict=True) if point.comparable],
        model=[(across[index], axis(value / divisor)) for index, value in drift.items()],
        level=axis(accepted[-1].value / divisor) if accepted else None,
        x_ticks=_labels(points, across),
        y_ticks=axis.ticks(),
    )


def _drift(trend: Trend) -> dict[int, float]:
    """By index of a run, the figure that there would be had the file moved as the float model did.

    It starts from the accepted run, or the first that is comparable; nothing where the float model has not moved.
    """
    known = [
        (index, point, value)
        for index, (point, value) in enumerate(zip(trend.points, trend.model, strict=bool(trend.model)))
        if point.comparable and value
    ]
    start = next((each for each in reversed(known) if each[1].accepted), known[0] if known else None)
    if start is None or len(known) < 2 or all(value == start[2] for _, _, value in known):
        return {}
    return {index: start[1].value * value / start[2] for index, _, value in known}


def blocks(trend: Trend) -> str:
    """The figures of comparable runs as a line of blocks, the largest the highest."""
    values = [point.value for point in trend.points if point.comparable]
    low, high = min(values), max(values)
    if high == low:
        return BLOCKS[len(BLOCKS) // 2] * len(values)
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in values)


def _title(trend: Trend, unit: str) -> str:
    on = f" on {trend.text}" if trend.text else ""
    return f"{trend.metric}{on}" + (f", {unit}" if unit else "")


def _across(count: int) -> list[float]:
    step = (FRAME.right - FRAME.left) / count
    return [FRAME.left + step * (index + 0.5) for index in range(count)]


def _axis(points: Sequence[TrendPoint], drift: Sequence[float], divisor: float) -> Axis:
    ends = [(point.value + sign * (point.stderr or 0.0)) / divisor for point in points for sign in (-1, 1)]
    ends += [value / divisor for value in drift]
    return linear_axis(ends, FRAME.bottom, FRAME.top)


def _mark(trend: Trend, point: TrendPoint, x: float, axis: Axis, divisor: float, kind: str) -> Mark:
    stderr = point.stderr or 0.0
    upper, lower = axis((point.value + stderr) / divisor), axis((point.value - stderr) / divisor)
    return Mark(
        x=x,
        y=axis(point.value / divisor),
        bar=(upper, lower) if lower - upper > 3.0 else None,
        kind=kind,
        tip=f"{run_name(point.run)}, {moment(point.started)}: {figure(point.value, trend.unit)}{_words(point)}",
    )


def _kind(point: TrendPoint, outcome: Outcome | None, *, newest: bool) -> str:
    if not point.comparable:
        return "other"
    if newest and outcome == "regressed":
        return "bad"
    if point.accepted:
        return "accepted"
    if newest:
        return "now"
    return "regressed" if point.verdict == "regressed" else "plain"


def _words(point: TrendPoint) -> str:
    words = [
        *(["accepted"] if point.accepted else []),
        *([f"the run {point.verdict}"] if point.verdict in ("passed", "regressed") else []),
        *([] if point.comparable else ["not comparable with the newest"]),
    ]
    return f" ({', '.join(words)})" if words else ""


def _labels(points: Sequence[TrendPoint], across: Sequence[float]) -> list[tuple[float, str]]:
    """The numbers of some runs, the newest among them."""
    step = -(-len(points) // LABELS)
    return [
        (across[index], "" if points[index].run is None else str(points[index].run))
        for index in range(len(points) - 1, -1, -step)
    ]
