"""Progress on the command line: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 5.0
"""Seconds between plain progress lines."""


class Display:
    """An observer that prints; see :class:`quantkit.system.progress.Observer`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._stage = ""
        self._started = time.monotonic()
        self._last_line = 0.0
        self._task: TaskID | None = None
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[step]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
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

    def stage(self, title: str) -> None:
        """Close the stage before with its time, and open the next."""
        self._close_stage()
        self._stage, self._started, self._last_line = title, time.monotonic(), 0.0
        if self._live:
            self._task = self._bars.add_task(title, total=None, step="")
        else:
            self._print(f"{title} ...")

    def progress(self, step: str, done: int, total: int) -> None:
        """Move the bar, or print a line now and then."""
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total, step=f"{step} {done}/{total}")
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY:
            self._last_line = now
            elapsed = now - self._started
            left = f", about {elapsed / done * (total - done):.0f} s left" if done else ""
            self._print(f"{self._stage}: {step} {done}/{total}, {elapsed:.0f} s{left}")

    def note(self, text: str) -> None:
        """Print a line; a warning also where the console is quiet."""
        if self._console.quiet and text.startswith("warning"):
            print(text, file=sys.stderr)  # noqa: T201 - the console prints nothing
        self._print(f"  {text}")

    def _close_stage(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        if self._stage:
            self._print(f"{self._stage}: done in {time.monotonic() - self._started:.1f} s")
            self._stage = ""

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)
