"""The plot of loss against size: one panel per text, laid out here and drawn by ``plot.svg.j2``.

Marks carry numbers, and a legend below the panel names them. The drawing uses classes and no colours of its own, so
that the page, or the style that a lone SVG file carries, can choose them for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantkit.report.axes import Axis, Frame, linear_axis, log_axis
from quantkit.report.columns import Record, reference_name, rows_of, texts_of
from quantkit.report.losses import frontier
from quantkit.report.mixes import families, mixes_of, without_mixes
from quantkit.report.numbers import byte_unit, figure, pick
from quantkit.schemes.mix import mix_of

WIDTH, LINE = 460.0, 19.0
"""Narrow enough that a phone shows all of it with text that can be read."""
FRAME = Frame(68.0, 44.0, WIDTH - 14.0, 320.0)
STYLES = 6
MARK, NUMBER = 5.5, 8.5
"""Radius of a mark, and of the circle that a number of two digits needs."""
LONGEST_NAME = 42
DISTANCES = (15.0, 24.0, 36.0, 50.0)
DIRECTIONS = [math.radians(degrees) for degrees in (0, 180, -45, 45, -135, 135, -90, 90)]
Place = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Datum:
    """A variant's figures in a panel: its size in bytes, and the value with its standard error."""

    number: int
    name: str
    method: str
    size: float
    value: float
    stderr: float | None


@dataclass(frozen=True, slots=True)
class Point:
    """A variant in a panel, in pixels.

    Attributes:
        number: its place in the report, from 1.
        style: which of the marker shapes and colours it has, by its method.
        x, y: its mark.
        bar: ends of the error bar, or None.
        label: the middle of its number.
        tip: name and figures, for the tooltip.
    """

    number: int
    style: int
    x: float
    y: float
    bar: tuple[float, float] | None
    label: Place
    tip: str

    @property
    def is_off(self) -> bool:
        """Whether the number stands so far off that a line ties it to the mark."""
        return math.dist((self.x, self.y), self.label) > DISTANCES[0] + 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the legend, in pixels; a method has no number."""

    x: float
    y: float
    style: int
    number: int | None
    name: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One text's plot.

    Attributes:
        frontier: marks of the variants than which no other is both smaller and closer, mixes apart.
        fronts: style and marks of the mixes that differ in their budget alone, by size.
    """

    title: str
    height: float
    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: list[Point]
    frontier: list[Place]
    fronts: list[tuple[int, list[Place]]]
    level: tuple[float, str] | None
    legend: list[Entry]
    width: float = WIDTH
    frame: Frame = FRAME


@dataclass(frozen=True, slots=True)
class Plot:
    """All panels of the plot, one above the other, the name of its file beside the Markdown report, and its mixes."""

    file: str
    caption: str
    panels: list[Panel]
    mixes: int = 0
    width: float = WIDTH

    @property
    def height(self) -> float:
        """Height of all panels."""
        return sum(panel.height for panel in self.panels)

    @property
    def lead(self) -> str:
        """How to read it."""
        told = "the dotted line joins the variants that no other one beats in both size and loss"
        told += ", mixes apart" if self.mixes else ""
        if any(panel.fronts for panel in self.panels):
            told += "; a solid one joins mixes that differ in their budget alone, of which only the marks were measured"
        return f"Lower and further left is better. Bars are standard errors; {told}."


def build_plot(report: Record) -> Plot | None:
    """KL divergence against size or, where it was not measured, perplexity; None if neither was."""
    reference = reference_name(report)
    for metric, file, words in (
        ("kl_divergence", "divergence.svg", f"KL divergence to {reference} against size"),
        ("perplexity", "perplexity.svg", f"Perplexity against size; the broken line is {reference}"),
    ):
        panels = [_panel(report, metric, text) for text in texts_of(report)]
        drawn = [panel for panel in panels if panel is not None]
        if drawn:
            return Plot(file, words, drawn, len(mixes_of(report)))
    return None


def _panel(report: Record, metric: str, text: str) -> Panel | None:
    data = _data(report, metric, text)
    if not data:
        return None
    unit, divisor = byte_unit([datum.size for datum in data])
    base = figure(report, "baseline", "metrics", "perplexity", text) if metric == "perplexity" else None
    x = linear_axis([datum.size / divisor for datum in data], FRAME.left, FRAME.right)
    y = _vertical(data, base)
    marks = {datum.name: (x(datum.size / divisor), y(datum.value)) for datum in data}
    line = [marks[name] for name in frontier(without_mixes(report), text) if name in marks]
    methods = list(dict.fromkeys(map(_method, report["variants"])))
    legend = _legend(data, methods)
    return Panel(
        title=text,
        height=max(entry.y for entry in legend) + LINE,
        x_title=f"Size, {unit}",
        y_title="KL divergence, nats per token" if metric == "kl_divergence" else "Perplexity",
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        points=_points(data, list(marks.values()), y, methods),
        frontier=line if len(line) > 1 else [],
        fronts=_fronts(report, data, marks, methods),
        level=None if base is None else (y(base), reference_name(report)),
        legend=legend,
    )


def _data(report: Record, metric: str, text: str) -> list[Datum]:
    found = []
    for number, (variant, row) in enumerate(zip(report["variants"], rows_of(report)[1:], strict=True), start=1):
        at = pick(row, "metrics", metric, text)
        size = figure(row, "size_bytes")
        value = figure(at, "mean") if metric == "kl_divergence" else figure({"value": at}, "value")
        if size is not None and value is not None:
            found.append(Datum(number, str(variant["name"]), _method(variant), size, value, figure(at, "stderr")))
    return found


def _method(variant: Record) -> str:
    """By what a variant's mark is chosen: its method, and whether its schemes are mixed."""
    mixed = ", mixed" if mix_of(variant.get("allocation")) is not None else ""
    return f"{variant.get('method')}{mixed}"


def _fronts(
    report: Record, data: Sequence[Datum], marks: Mapping[str, Place], methods: list[str]
) -> list[tuple[int, list[Place]]]:
    """Of each family of mixes the style and the marks that were measured, by size."""
    by_name = {datum.name: datum for datum in data}
    found = []
    for names in families(report):
        own = sorted((by_name[name] for name in names if name in by_name), key=lambda datum: datum.size)
        if len(own) > 1:
            found.append((methods.index(own[0].method) % STYLES, [marks[datum.name] for datum in own]))
    return found


def _vertical(data: Sequence[Datum], base: float | None) -> Axis:
    """The vertical axis; figures of zero or less, which it cannot hold, are drawn at its lower end."""
    values = [datum.value for datum in data] + ([] if base is None else [base])
    ends = [datum.value + sign * (datum.stderr or 0.0) for datum in data for sign in (1, -1)]
    positive = [value for value in values if value > 0]
    floor = min(positive, default=1e-6) / 3
    return log_axis([*(positive or [1e-6]), *(end for end in ends if end >= floor)], FRAME.bottom, FRAME.top)


def _points(data: Sequence[Datum], marks: Sequence[Place], y: Axis, methods: list[str]) -> list[Point]:
    return [
        Point(
            number=datum.number,
            style=methods.index(datum.method) % STYLES,
            x=mark[0],
            y=mark[1],
            bar=_bar(datum, y),
            label=label,
            tip=f"{datum.name}: {datum.value:.4g}" + ("" if datum.stderr is None else f" ± {datum.stderr:.2g}"),
        )
        for datum, mark, label in zip(data, marks, place_numbers(marks), strict=True)
    ]


def place_numbers(marks: Sequence[Place]) -> list[Place]:
    """The middle of each mark's number: the nearest place around the mark that no mark and no other number takes."""
    placed: list[Place] = []
    for x, y in marks:
        around = [(x + r * math.cos(angle), y + r * math.sin(angle)) for r in DISTANCES for angle in DIRECTIONS]
        inside = [place for place in around if FRAME.holds(place, NUMBER)] or around
        placed.append(next((place for place in inside if _room(place, marks, placed) >= 0), inside[0]))
    return placed


def _room(place: Place, marks: Sequence[Place], placed: Sequence[Place]) -> float:
    """Pixels between a number and what is nearest to it; negative where it would cover something."""
    gaps = [math.dist(place, mark) - MARK - NUMBER for mark in marks]
    return min([*gaps, *(math.dist(place, other) - 2 * NUMBER for other in placed)])


def _bar(datum: Datum, y: Axis) -> tuple[float, float] | None:
    """Ends of the error bar, the upper first; None where it would be shorter than the mark."""
    if not datum.stderr:
        return None
    upper, lower = y(datum.value + datum.stderr), y(max(datum.value - datum.stderr, y.low))
    return (upper, lower) if lower - upper > 2.0 else None


def _legend(data: Sequence[Datum], methods: list[str]) -> list[Entry]:
    """The methods, two to a line, where a shape tells them apart; then the variants, a line each."""
    shown = [method for method in methods if any(datum.method == method for datum in data)]
    kinds = [(methods.index(name) % STYLES, None, name) for name in shown] if 1 < len(shown) <= STYLES else []
    variants = [(methods.index(datum.method) % STYLES, datum.number, datum.name) for datum in data]
    top = FRAME.bottom + 68.0
    entries = _lines(kinds, 2, top)
    return entries + _lines(variants, 1, entries[-1].y + 1.4 * LINE if entries else top)


def _lines(entries: Sequence[tuple[int, int | None, str]], columns: int, top: float) -> list[Entry]:
    width = (FRAME.right - FRAME.left) / columns
    return [
        Entry(FRAME.left + width * (index % columns), top + LINE * (index // columns), style, number, _shortened(name))
        for index, (style, number, name) in enumerate(entries)
    ]


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
