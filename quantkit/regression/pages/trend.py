"""A figure over the last runs, laid out as a plot and as a line of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.regression.document import Trend, TrendPoint
from quantkit.regression.pages.words import figure, moment, run_name
from quantkit.report.axes import Axis, Frame, linear_axis
from quantkit.report.numbers import byte_unit

WIDTH, HEIGHT = 560.0, 210.0
FRAME = Frame(66.0, 40.0, WIDTH - 18.0, HEIGHT - 34.0)
LABELS = 8
"""Runs whose numbers stand below the plot at most."""
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Mark:
    """A run in a plot, in pixels; ``kind`` is one of ``plain``, ``accepted``, ``bad``, ``other`` and ``now``."""

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
        marks: oldest first.
        line: through the runs that may stand beside the newest one.
        level: pixel of the accepted run's figure; None where there is none.
        x_ticks, y_ticks: pixels and labels.
    """

    title: str
    caption: str
    marks: list[Mark]
    line: list[tuple[float, float]]
    level: float | None
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: float = WIDTH
    height: float = HEIGHT
    frame: Frame = FRAME


def build_trend(trend: Trend, *, named: bool = True) -> TrendPanel | None:
    """The plot of a figure, with the variant's name if ``named``; None where it was taken in one run alone."""
    points = trend.points
    if len(points) < 2:
        return None
    unit, divisor = byte_unit([point.value for point in points]) if trend.unit == "bytes" else (trend.unit, 1)
    across = _across(len(points))
    axis = _axis(points, divisor)
    marks = [
        _mark(trend, point, place, axis, divisor, newest=point is points[-1])
        for point, place in zip(points, across, strict=True)
    ]
    accepted = [point for point in points if point.accepted and point.comparable]
    better = "lower" if trend.lower_is_better else "higher"
    return TrendPanel(
        title=(f"{trend.variant}: " if named else "") + _title(trend, unit),
        caption=f"now {figure(points[-1].value, trend.unit)}, {better} is better",
        marks=marks,
        line=[(mark.x, mark.y) for mark, point in zip(marks, points, strict=True) if point.comparable],
        level=axis(accepted[-1].value / divisor) if accepted else None,
        x_ticks=_labels(points, across),
        y_ticks=axis.ticks(),
    )


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


def _axis(points: Sequence[TrendPoint], divisor: float) -> Axis:
    ends = [(point.value + sign * (point.stderr or 0.0)) / divisor for point in points for sign in (-1, 1)]
    return linear_axis(ends, FRAME.bottom, FRAME.top)


def _mark(trend: Trend, point: TrendPoint, x: float, axis: Axis, divisor: float, *, newest: bool) -> Mark:
    stderr = point.stderr or 0.0
    upper, lower = axis((point.value + stderr) / divisor), axis((point.value - stderr) / divisor)
    return Mark(
        x=x,
        y=axis(point.value / divisor),
        bar=(upper, lower) if lower - upper > 3.0 else None,
        kind=_kind(point, newest=newest),
        tip=f"{run_name(point.run)}, {moment(point.started)}: {figure(point.value, trend.unit)}{_words(point)}",
    )


def _kind(point: TrendPoint, *, newest: bool) -> str:
    if not point.comparable:
        return "other"
    if point.verdict == "regressed":
        return "bad"
    if point.accepted:
        return "accepted"
    return "now" if newest else "plain"


def _words(point: TrendPoint) -> str:
    words = [
        *(["accepted"] if point.accepted else []),
        *([point.verdict] if point.verdict else []),
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
