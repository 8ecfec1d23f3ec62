"""The report as Markdown, with its plot as an SVG file beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from quantkit.report.columns import Cell, Column, Record, build_columns, reference_name, scheme_name, texts_of
from quantkit.report.comparison import failure
from quantkit.report.numbers import ABSENT
from quantkit.report.page import context, environment, template_text
from quantkit.report.plot import Plot, build_plot
from quantkit.report.recommendation import recommend

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#$])")
_COST = (
    *(
        "size",
        "ratio",
        "bits",
        "file_bits",
        "blocks",
        "server",
        "weights",
        "peak",
        "at_prefill",
        "estimated",
        "estimate_ratio",
    ),
    *("prefill", "decode", "quantize", "evaluate"),
)
_QUALITY = ("kl", "median", "p99", "perplexity", "rise", "share", "top1")
_BAR = 40


def render_markdown(report: Record) -> dict[str, str]:
    """``report.md`` and, where there is something to plot, the SVG file that it shows; by file name."""
    engine = environment(autoescape=False, finalize=escaped)
    engine.filters["code"] = code
    engine.filters["fence"] = fence
    engine.filters["row"] = row
    engine.filters["marked"] = marked
    engine.filters["bar"] = lambda share: "█" * round(_BAR * share) or "▏"
    tables = {
        "cost": _cost_table(report),
        "quality": [(text, _quality_table(report, text)) for text in texts_of(report)],
    }
    plot = build_plot(report)
    text = engine.get_template("report.md.j2").render(context(report, plot), **tables)
    drawing = {plot.file: render_svg(plot)} if plot else {}
    return {"report.md": re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", **drawing}


def render_svg(plot: Plot) -> str:
    """All panels of a plot as an SVG file that carries its own style, for light and dark."""
    engine = environment(autoescape=True)
    return engine.get_template("lone.svg.j2").render(plot=plot, style=Markup(template_text(engine, "plot.css")))


def escaped(value: Any) -> str:
    """Text with everything that Markdown or HTML would read as markup made plain, on one line."""
    if isinstance(value, Markup):
        return value
    text = " ".join(str(value).split()).replace("&", "&amp;")
    return Markup(_SPECIAL.sub(r"\\\1", text).replace("\\<", "&lt;").replace("\\>", "&gt;"))


def code(value: Any) -> str:
    """Text as a code span, also inside a table."""
    text = " ".join(str(value).split())
    ticks = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return Markup(f"{ticks}{pad}{text}{pad}{ticks}".replace("|", "\\|"))


def marked(pieces: Sequence[str], parts: bool) -> str:
    """A text in three pieces on one line, the middle one bold; where there is none and it parts, its end is marked."""
    before, token, after = (_with_ends(piece) for piece in pieces)
    bold = token.strip() or ("∎" if parts else "")
    middle = token.replace(token.strip(), f"**{bold}**", 1) if token.strip() else f"**{bold}**" if bold else ""
    return Markup(f"{before}{middle}{after}".strip())


def _with_ends(text: str) -> str:
    """Escaped text with the spaces at its ends, one each."""
    left, right = (" " if text.strip() and edge.isspace() else "" for edge in (text[:1], text[-1:]))
    return f"{left}{escaped(text)}{right}"


def fence(value: Any, language: str = "") -> str:
    """Text as a code block whose fence is longer than any run of backticks in it."""
    text = str(value).rstrip("\n")
    ticks = "`" * max(3, _longest_run(text) + 1)
    return Markup(f"{ticks}{language}\n{text}\n{ticks}")


def row(cells: list[Any]) -> str:
    """A row of a table."""
    return Markup("| " + " | ".join(escaped(cell) for cell in cells) + " |")


def _cost_table(report: Record) -> list[list[Any]]:
    columns = build_columns(report)
    shown = [columns[key] for key in _COST if key in columns]
    lines: list[list[Any]] = [["Variant", "Method", "Scheme", "Format", *(column.title for column in shown)]]
    lines.append([Markup(":--")] * 4 + [Markup("--:")] * len(shown))
    lines.append([reference_name(report), ABSENT, _dtype(report), ABSENT, *_figures(shown, 0)])
    marks = recommend(report).marks()
    for index, variant in enumerate(report["variants"], start=1):
        error = failure(variant)
        figures: list[Any] = _figures(shown, index)
        if error is not None:
            figures = [Markup(f"**failed:** {escaped(error)}"), *[""] * (len(shown) - 1)]
        mark = marks.get(str(variant["name"]))
        title = f" {escaped(variant['title'])}" if variant.get("title") else ""
        name = Markup(f"{code(variant['name'])}{title}{f' ({mark})' if mark else ''}")
        lines.append([name, *_identity(variant), *figures])
    return lines


def _quality_table(report: Record, text: str) -> list[list[Any]]:
    columns = build_columns(report)
    shown = [columns[f"{key}:{text}"] for key in _QUALITY if f"{key}:{text}" in columns]
    lines: list[list[Any]] = [["Variant", *(column.title for column in shown)]]
    lines.append([Markup(":--")] + [Markup("--:")] * len(shown))
    lines.append([reference_name(report), *_figures(shown, 0)])
    for index, variant in enumerate(report["variants"], start=1):
        figures = ["failed"] + [""] * (len(shown) - 1) if failure(variant) is not None else _figures(shown, index)
        lines.append([code(variant["name"]), *figures])
    return lines


def _identity(variant: Record) -> list[str]:
    return [str(variant.get("method") or ABSENT), scheme_name(variant), str(variant.get("format") or ABSENT)]


def _dtype(report: Record) -> str:
    return str((report.get("source") or {}).get("dtype") or ABSENT)


def _figures(columns: list[Column], index: int) -> list[Any]:
    return [_marked(column.cells[index]) for column in columns]


def _marked(cell: Cell) -> Any:
    return Markup(f"**{escaped(cell.text)}**") if cell.best else cell.text


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)
