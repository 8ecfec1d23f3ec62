"""The plot of loss against size: one panel per text, laid out here and drawn by ``plot.svg.j2``.

The drawing uses classes and no colours of its own, so that the page, or the style that a lone SVG file
carries, can choose them for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from quantkit.report.axes import Axis, linear_axis, log_axis
from quantkit.report.choice import frontier
from quantkit.report.columns import Record, reference_name, rows_of, texts_of
from quantkit.report.labels import Box, Spot, place_labels, text_width
from quantkit.report.numbers import byte_unit, figure, pick

LEFT, RIGHT, TOP, BOTTOM = 68.0, 22.0, 44.0, 52.0
STYLES = 6
MARK = 5.5
LONGEST_NAME = 34


@dataclass(frozen=True, slots=True)
class Point:
    """A variant in a panel, in pixels.

    Attributes:
        name: as it is shown.
        style: which of the marker shapes and colours it has, by its method.
        x, y: its mark.
        bar: ends of the error bar, or None.
        spot: where its name stands.
        tip: the figures, for the tooltip.
    """

    name: str
    style: int
    x: float
    y: float
    bar: tuple[float, float] | None
    spot: Spot
    tip: str

    @property
    def leader(self) -> tuple[float, float, float, float] | None:
        """The line from the mark's edge to a name that stands off."""
        if self.spot.leader is None:
            return None
        x, y = self.spot.leader
        length = math.hypot(x - self.x, y - self.y)
        return self.x + (x - self.x) * MARK / length, self.y + (y - self.y) * MARK / length, x, y


@dataclass(frozen=True, slots=True)
class Panel:
    """One text's plot."""

    title: str
    width: float
    height: float
    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: list[Point]
    frontier: list[tuple[float, float]]
    level: tuple[float, str] | None
    legend: list[tuple[float, int, str]] = field(default_factory=list)

    @property
    def frame(self) -> Box:
        """Where figures are drawn."""
        return Box(LEFT, TOP, self.width - RIGHT, self.height - BOTTOM)


@dataclass(frozen=True, slots=True)
class Datum:
    """A variant's figures in a panel: its size in bytes, and the value with its standard error."""

    name: str
    method: str
    size: float
    value: float
    stderr: float | None


@dataclass(frozen=True, slots=True)
class Plot:
    """All panels of the plot, and the name of its file beside the Markdown report."""

    file: str
    caption: str
    panels: list[Panel]

    @property
    def width(self) -> float:
        """Width of all panels, one above the other."""
        return max(panel.width for panel in self.panels)

    @property
    def height(self) -> float:
        """Height of all panels, one above the other."""
        return sum(panel.height for panel in self.panels)


def build_plot(report: Record, width: float = 640.0, height: float = 400.0) -> Plot | None:
    """KL divergence against size or, where it was not measured, perplexity; None if neither was."""
    reference = reference_name(report)
    for metric, file, words in (
        ("kl_divergence", "divergence.svg", f"KL divergence to {reference} against size"),
        ("perplexity", "perplexity.svg", f"Perplexity against size; the broken line is {reference}"),
    ):
        panels = [_panel(report, metric, text, (width, height)) for text in texts_of(report)]
        drawn = [panel for panel in panels if panel is not None]
        if drawn:
            return Plot(file, words, drawn)
    return None


def _panel(report: Record, metric: str, text: str, extent: tuple[float, float]) -> Panel | None:
    data = _data(report, metric, text)
    if not data:
        return None
    width, height = extent
    unit, divisor = byte_unit([datum.size for datum in data])
    base = figure(report, "baseline", "metrics", "perplexity", text) if metric == "perplexity" else None
    x = linear_axis([datum.size / divisor for datum in data], LEFT, width - RIGHT)
    y = _vertical(data, base, height - BOTTOM, TOP)
    kept = frontier(report, text)
    line = [(x(d.size / divisor), y(d.value)) for name in kept for d in data if d.name == name]
    methods = list(dict.fromkeys(str(row.get("method")) for row in report["variants"]))
    return Panel(
        title=text,
        width=width,
        height=height,
        x_title=f"Size, {unit}",
        y_title="KL divergence, nats per token" if metric == "kl_divergence" else "Perplexity",
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        points=_points(data, [x(datum.size / divisor) for datum in data], y, methods, extent),
        frontier=line if len(line) > 1 else [],
        level=None if base is None else (y(base), reference_name(report)),
        legend=_legend([method for method in methods if any(d.method == method for d in data)], methods, width),
    )


def _data(report: Record, metric: str, text: str) -> list[Datum]:
    found = []
    for variant, row in zip(report["variants"], rows_of(report)[1:], strict=True):
        at = pick(row, "metrics", metric, text)
        size = figure(row, "size_bytes")
        value = figure(at, "mean") if metric == "kl_divergence" else figure({"value": at}, "value")
        if size is not None and value is not None:
            name, method = str(variant["name"]), str(variant.get("method"))
            found.append(Datum(name, method, size, value, figure(at, "stderr")))
    return found


def _vertical(data: Sequence[Datum], base: float | None, start: float, stop: float) -> Axis:
    """The vertical axis; figures of zero or less, which it cannot hold, are drawn at its lower end."""
    values = [datum.value for datum in data] + ([] if base is None else [base])
    ends = [datum.value + sign * (datum.stderr or 0.0) for datum in data for sign in (1, -1)]
    positive = [value for value in values if value > 0]
    floor = min(positive, default=1e-6) / 3
    return log_axis([*(positive or [1e-6]), *(end for end in ends if end >= floor)], start, stop)


def _points(
    data: Sequence[Datum], across: Sequence[float], y: Axis, methods: list[str], extent: tuple[float, float]
) -> list[Point]:
    marks = [(x, y(datum.value)) for x, datum in zip(across, data, strict=True)]
    bars = [_bar(datum, y) for datum in data]
    boxes = [Box(px - MARK, py - MARK, px + MARK, py + MARK) for px, py in marks]
    boxes += [Box(px - 2, bar[0], px + 2, bar[1]) for (px, _), bar in zip(marks, bars, strict=True) if bar]
    area = Box(LEFT + 3, TOP + 2, extent[0] - 4, extent[1] - BOTTOM - 3)
    names = [_shortened(datum.name) for datum in data]
    spots = place_labels(marks, names, boxes, area)
    return [
        Point(
            name=name,
            style=methods.index(datum.method) % STYLES,
            x=mark[0],
            y=mark[1],
            bar=bar,
            spot=spot,
            tip=f"{datum.name}: {datum.value:.4g}" + ("" if datum.stderr is None else f" ± {datum.stderr:.2g}"),
        )
        for name, datum, mark, bar, spot in zip(names, data, marks, bars, spots, strict=True)
    ]


def _bar(datum: Datum, y: Axis) -> tuple[float, float] | None:
    """Ends of the error bar, the upper first; None where it would be shorter than the mark."""
    if not datum.stderr:
        return None
    upper, lower = y(datum.value + datum.stderr), y(max(datum.value - datum.stderr, y.low))
    return (upper, lower) if lower - upper > 2.0 else None


def _legend(shown: list[str], methods: list[str], width: float) -> list[tuple[float, int, str]]:
    """Place, style and name of each method, ending at the right edge."""
    if len(shown) < 2 or len(shown) > STYLES:
        return []
    widths = [text_width(name) + 26 for name in shown]
    places = [width - RIGHT - sum(widths[index:]) for index in range(len(shown))]
    return [(place, methods.index(name) % STYLES, name) for place, name in zip(places, shown, strict=True)]


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
