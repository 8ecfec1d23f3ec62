"""Tables that fit the terminal: numbers whole, names wrapped after their separators, what does not fit told.

A table drawn by rich alone shrinks every column until all fit, and cuts numbers on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
    from rich.table import Table
    from rich.text import Text

GAP = 2
"""Cells between two columns."""
NAME_WIDTH, NAME_SHARE = 16, 4
"""A text is wrapped at no less than so many cells, or its share of the table's width: one part of so many."""
LONGEST_WORD = 14
"""Cells of a word of a title; a longer one is shortened in the middle."""
_PIECES = re.compile(r"[^\s\-_./,]*[\s\-_./,]?")


@dataclass(frozen=True, slots=True)
class Shown:
    """A column.

    Attributes:
        title: wrapped between its words.
        cells: one a row.
        rank: the lower, the longer it stays where there is little room; 0 always does.
        number: is never wrapped and stands to the right.
    """

    title: str
    cells: Sequence[Text]
    rank: int
    number: bool = False


class FittedTable:
    """A table as wide as the console that prints it.

    Args:
        columns: from left to right; all have as many cells.
        title: above it.
        notes: lines below it.
        everything: columns that do not fit follow in further tables, each with the columns of rank 0.
        remedy: what shows the columns that were left out.
    """

    def __init__(
        self,
        columns: Sequence[Shown],
        *,
        title: str = "",
        notes: Sequence[Text] = (),
        everything: bool = False,
        remedy: str = "",
    ) -> None:
        self.columns, self.title, self.notes = tuple(columns), title, tuple(notes)
        self.everything, self.remedy = everything, remedy

    @property
    def row_count(self) -> int:
        """Rows below the titles."""
        return len(self.columns[0].cells) if self.columns else 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The tables and lines, for rich."""
        from rich.text import Text

        shown, left = self._that_fit(options.max_width, self.columns)
        if self.title:
            yield Text(self.title, style="italic")
        yield self._drawn(shown, options.max_width)
        while self.everything and left:
            head = [column for column in self.columns if column.rank == 0]
            shown, left = self._that_fit(options.max_width, [*head, *left])
            yield self._drawn(shown, options.max_width)
        if left:
            names = ", ".join(column.title for column in left)
            yield Text(f"not at this width: {names}{f'; {self.remedy}' if self.remedy else ''}", style="dim")
        yield from self.notes

    def _that_fit(self, width: int, columns: Sequence[Shown]) -> tuple[list[Shown], list[Shown]]:
        """The columns that there is room for, by rank, and the others, both from left to right."""
        room = width
        kept: set[int] = set()
        for place in sorted(range(len(columns)), key=lambda place: (columns[place].rank, place)):
            needed = least_width(columns[place], width) + GAP
            if columns[place].rank == 0 or needed <= room or len(kept) < 2:
                kept.add(place)
                room -= needed
        shown = [column for place, column in enumerate(columns) if place in kept]
        return shown, [column for place, column in enumerate(columns) if place not in kept]

    def _drawn(self, columns: Sequence[Shown], width: int) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        widths = [least_width(column, width) for column in columns]
        room = width - sum(each + GAP for each in widths)
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        for place, column in enumerate(columns):
            more = 0 if column.number else max(0, min(room, most_width(column) - widths[place]))
            widths[place] += more
            room -= more
            title = "\n".join(_title_lines(column.title, widths[place]))
            side: JustifyMethod = "right" if column.number else "left"
            table.add_column(title, justify=side, vertical="top", width=widths[place], no_wrap=True)
        for row in range(self.row_count):
            table.add_row(*(_wrapped_text(*each, row) for each in zip(columns, widths, strict=True)))
        return table


def least_width(column: Shown, width: int) -> int:
    """Cells that a column needs in a table of so many: of a number all, of a text enough to be read when wrapped."""
    from rich.cells import cell_len

    title = max((cell_len(word) for word in _title_words(column.title)), default=0)
    longest = most_width(column)
    if column.number:
        return max(title, longest)
    pieces = (cell_len(piece.rstrip()) for cell in column.cells for piece in _PIECES.findall(cell.plain))
    share = max(NAME_WIDTH, width // NAME_SHARE) if column.rank == 0 else NAME_WIDTH
    wanted = longest if column.rank == 0 else max(*pieces, (longest + 1) // 2 + 1)
    return max(title, min(wanted, longest, share))


def most_width(column: Shown) -> int:
    """Cells of the longest line of a column."""
    from rich.cells import cell_len

    lines = (cell_len(line) for cell in column.cells for line in cell.plain.split("\n"))
    return max(lines, default=0)


def shortened(text: str, cells: int) -> str:
    """A text with its middle left out where it is longer than ``cells``."""
    if len(text) <= cells:
        return text
    tail = (cells - 1) // 2
    return f"{text[: cells - 1 - tail]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - tail :]}"


def wrapped(text: str, cells: int) -> list[str]:
    """Lines of a text of at most ``cells``, broken after separators where it has any in reach."""
    from rich.cells import cell_len, chop_cells

    lines = [""]
    for piece in _PIECES.findall(text):
        if lines[-1] and cell_len(lines[-1]) + cell_len(piece.rstrip()) > cells:
            lines.append("")
        chopped = chop_cells(piece, cells) if cell_len(piece.rstrip()) > cells else [piece]
        lines[-1] += chopped[0] if chopped else ""
        lines += chopped[1:]
    return [line.rstrip() for line in lines]


def _wrapped_text(column: Shown, cells: int, row: int) -> Text:
    from rich.text import Text

    cell = column.cells[row]
    if column.number:
        return cell
    lines = [line for part in cell.plain.split("\n") for line in wrapped(part, cells)]
    return Text("\n".join(lines), style=cell.style)


def _title_words(title: str) -> list[str]:
    return [shortened(word, LONGEST_WORD) for word in title.split()]


def _title_lines(title: str, cells: int) -> Iterator[str]:
    from rich.cells import cell_len

    line = ""
    for word in _title_words(title):
        if line and cell_len(line) + 1 + cell_len(word) > cells:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    yield line
