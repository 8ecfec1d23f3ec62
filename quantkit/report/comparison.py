"""The comparison table as the page shows it: columns in groups, with a second figure below the first."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quantkit.report.columns import (
    Cell,
    Column,
    Record,
    build_columns,
    reference_name,
    scheme_name,
    texts_of,
)
from quantkit.report.numbers import ABSENT
from quantkit.report.recommendation import recommend

Shape = list[tuple[str, str]]
"""Keys of the columns that share a place, the main one first, each with its title or ``""`` for its own."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A column of the page: a main figure, and below it those that belong to it.

    Attributes:
        title: of the main figure.
        subtitle: of the figures below.
        first: the column begins a group.
    """

    title: str
    subtitle: str
    main: Column
    below: tuple[Column, ...]
    first: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A row: who it is, and either its figures or why it has none.

    Attributes:
        cells: for each column its main figure and those below it.
        error: why the variant failed, or None.
        mark: ``recommended``, ``broken`` or nothing.
        title: what the recipe says beside the name.
    """

    name: str
    method: str
    scheme: str
    format: str
    cells: tuple[tuple[Cell, tuple[Cell, ...]], ...]
    error: str | None
    reference: bool = False
    mark: str = ""
    title: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The table: titles of the groups with how many columns each spans, the columns, the rows."""

    groups: tuple[tuple[str, int], ...]
    stacks: tuple[Stack, ...]
    lines: tuple[Line, ...]

    @property
    def width(self) -> int:
        """Columns right of those that say who a row is."""
        return len(self.stacks)


def build_comparison(report: Record) -> Comparison:
    """The comparison table of a report."""
    columns = build_columns(report)
    groups: list[tuple[str, int]] = []
    stacks: list[Stack] = []
    for title, shapes in _shapes(report):
        found = [stack for shape in shapes if (stack := _stack(columns, shape)) is not None]
        if found:
            groups.append((title, len(found)))
            stacks += [replace(found[0], first=True), *found[1:]]
    return Comparison(tuple(groups), tuple(stacks), _lines(report, stacks))


def failure(variant: Record) -> str | None:
    """Why a variant failed, or None if it did not."""
    if variant.get("status") == "ok":
        return None
    return str(variant.get("error") or "no reason was recorded")


def _shapes(report: Record) -> list[tuple[str, list[Shape]]]:
    per_text: list[tuple[str, list[Shape]]] = [
        (
            text,
            [
                [(f"kl:{text}", "KL divergence"), (f"median:{text}", "median"), (f"p99:{text}", "p99")],
                [(f"perplexity:{text}", "Perplexity"), (f"rise:{text}", "Δ"), (f"share:{text}", "Δ %")],
                [(f"top1:{text}", "Top-1")],
            ],
        )
        for text in texts_of(report)
    ]
    return [
        (
            "On disk",
            [
                [("size", ""), ("ratio", "")],
                [("bits", "Bits"), ("file_bits", "Whole file"), ("blocks", "Of the blocks")],
            ],
        ),
        *per_text,
        (
            "Memory",
            [
                [("server", "")],
                [("weights", ""), ("peak", "")],
                [("at_prefill", ""), ("estimated", ""), ("estimate_ratio", "estimated / measured")],
            ],
        ),
        ("Tokens/s", [[("decode", "Decode"), ("prefill", "prefill")]]),
        ("Time", [[("quantize", "Quantize"), ("evaluate", "evaluate")]]),
    ]


def _stack(columns: dict[str, Column], shape: Shape) -> Stack | None:
    """The figures of ``shape`` that there are, the first of them as the main one."""
    found = [(columns[key], title or columns[key].title) for key, title in shape if key in columns]
    if not found:
        return None
    (main, title), below = found[0], found[1:]
    subtitle = " · ".join(_lowered(name) for _, name in below)
    return Stack(title[0].upper() + title[1:], subtitle, main, tuple(column for column, _ in below))


def _lowered(title: str) -> str:
    return title[0].lower() + title[1:] if title[0].isascii() else title


def _lines(report: Record, stacks: list[Stack]) -> tuple[Line, ...]:
    lines = [Line(reference_name(report), _dtype(report), "", "", _cells(stacks, 0), None, reference=True)]
    marks = recommend(report).marks()
    for index, variant in enumerate(report["variants"], start=1):
        lines.append(
            Line(
                str(variant["name"]),
                str(variant.get("method") or ABSENT),
                scheme_name(variant),
                str(variant.get("format") or ABSENT),
                _cells(stacks, index),
                failure(variant),
                mark=marks.get(str(variant["name"]), ""),
                title=str(variant.get("title") or ""),
            )
        )
    return tuple(lines)


def _dtype(report: Record) -> str:
    return str((report.get("source") or {}).get("dtype") or ABSENT)


def _cells(stacks: list[Stack], index: int) -> tuple[tuple[Cell, tuple[Cell, ...]], ...]:
    found = [(stack.main.cells[index], tuple(column.cells[index] for column in stack.below)) for stack in stacks]
    return tuple((main, below if any(cell.text != ABSENT for cell in below) else ()) for main, below in found)
