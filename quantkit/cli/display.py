"""Progress on the command line: a live bar on a terminal, plain lines anywhere else; both tell the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from quantkit.system.pace import Ahead, Pace, about
from quantkit.system.progress import Row

LINE_EVERY = 5.0
"""Seconds between plain progress lines."""


class Display:
    """An observer that prints; see :class:`quantkit.system.progress.Observer`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._pace = Pace()
        self._stage = ""
        self._started = time.monotonic()
        self._last_line = 0.0
        self._task: TaskID | None = None
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[step]}"),
            TimeElapsedColumn(),
            _Left(self._pace),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Display:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._close_stage()
        if self._live:
            self._bars.stop()

    def expect(self, ahead: Sequence[Ahead]) -> None:
        """Keep what is to come, and say how long it will take; see :class:`quantkit.system.pace.Expectant`."""
        self._pace.expect(ahead)
        left = self._pace.run_left()
        if left is not None:
            self._print(f"  {run_words(self._pace, left)}")

    def stage(self, title: str) -> None:
        """Close the stage before with its time, and open the next."""
        self._close_stage()
        self._pace.stage(title)
        self._stage, self._started, self._last_line = title, time.monotonic(), 0.0
        if self._live:
            self._task = self._bars.add_task(title, total=None, step="")
        else:
            self._print(f"{title} ...")

    def progress(self, step: str, done: int, total: int) -> None:
        """Move the bar, or print a line now and then."""
        self._pace.progress(step, done, total)
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total, step=f"{step} {done}/{total}")
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY:
            self._last_line = now
            told = [f"{self._stage}: {step} {done}/{total}", f"{now - self._started:.0f} s", *left_words(self._pace)]
            self._print(", ".join(told))

    def note(self, text: str) -> None:
        """Print a line; a warning also where the console is quiet."""
        if self._console.quiet and text.startswith("warning"):
            print(text, file=sys.stderr)  # noqa: T201 - the console prints nothing
        self._print(f"  {text}")

    def row(self, title: str) -> Row:
        """A row for a piece of work among others: on a terminal a bar of its own, which says where it runs."""
        return _TaskRow(self, title)

    def add_bar(self, title: str) -> TaskID | None:
        """A further bar; None where there are no bars."""
        return self._bars.add_task(title, total=None, step="waits for a node") if self._live else None

    def move_bar(self, bar: TaskID, **fields: Any) -> None:
        """Change a bar."""
        self._bars.update(bar, **fields)

    def drop_bar(self, bar: TaskID) -> None:
        """Take a bar away."""
        self._bars.remove_task(bar)

    def say(self, text: str) -> None:
        """Print a line."""
        self._print(text)

    def _close_stage(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        if self._stage:
            self._print(f"{self._stage}: done in {time.monotonic() - self._started:.1f} s")
            self._stage = ""

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _TaskRow:
    """A piece of work among others; see :class:`quantkit.system.progress.Row`."""

    def __init__(self, display: Display, title: str) -> None:
        self._display, self._title = display, title
        self._bar = display.add_bar(title)
        self._begun = self._last_line = time.monotonic()
        self._host = ""

    def stage(self, title: str) -> None:
        """A part of it begins."""
        self._display.say(f"  {self._title}: {title}")

    def placed(self, host: str) -> None:
        """It runs there."""
        self._host, self._begun = host, time.monotonic()
        if self._bar is None:
            self._display.say(f"{self._title} on {host} ...")
        else:
            self._display.move_bar(self._bar, description=f"{self._title} on {host}", step="")

    def progress(self, step: str, done: int, total: int) -> None:
        """Move its bar, or print a line now and then."""
        if self._bar is not None:
            self._display.move_bar(self._bar, completed=done, total=total, step=f"{step} {done}/{total}")
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY:
            self._last_line = now
            where = f" on {self._host}" if self._host else ""
            self._display.say(f"{self._title}{where}: {step} {done}/{total}, {now - self._begun:.0f} s")

    def note(self, text: str) -> None:
        """Print a line that names it."""
        start, mark, rest = text.partition("warning: ")
        named = f"warning: {self._title}: {rest}" if mark and not start else f"{self._title}: {text}"
        self._display.note(named)

    def close(self) -> None:
        """Take its bar away, and say how long it took."""
        if self._bar is not None:
            self._display.drop_bar(self._bar)
        self._display.say(f"{self._title}: ended after {time.monotonic() - self._begun:.1f} s")


class _Left(ProgressColumn):
    """What is left, of the step and of the run."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:
        """In words; of the moment, not of the last progress."""
        return Text(", ".join(left_words(self._pace)), style="progress.remaining")


def left_words(pace: Pace) -> list[str]:
    """What is left of the step and of the run, as far as it is known."""
    step, run = pace.step_left(), pace.run_left()
    told = [] if step is None else [f"about {about(step)} left of this step"]
    return told if run is None else [*told, run_words(pace, run)]


def run_words(pace: Pace, left: float) -> str:
    """What is left of the run; that it is rough where little of it was measured yet."""
    return f"{'very roughly' if pace.is_rough() else 'about'} {about(left)} left of the run"
