"""What happens in a run as JSON lines, for pipelines and for whoever asks later how it went.

Each line is an object with ``time`` (UTC, ISO 8601), ``elapsed`` (seconds since the log began, from a clock that never
jumps) and ``event``: ``start``, ``stage`` (``title``), ``progress`` (``step``, ``done``, ``total``, and as far as they
are known ``step_left`` and ``run_left``, seconds), ``note`` (``text``), ``error`` (``text``) and ``end`` (``status``).
Others may be added; readers skip what they do not know.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import IO, Any

from quantkit.system.artifacts import translated_os_errors
from quantkit.system.pace import Ahead, Pace
from quantkit.system.progress import Row

PROGRESS_EVERY = 1.0
"""Seconds between progress lines of one step; its last one is always written."""


class EventLog:
    """An observer that writes JSON lines; see :class:`quantkit.system.progress.Observer`.

    Args:
        stream: text, written and flushed line by line.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._pace = Pace()
        self._started = time.monotonic()
        self._step = ""
        self._last = 0.0
        self._lock = Lock()

    def write(self, event: str, **facts: Any) -> None:
        """Write one line; any thread may."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "elapsed": round(time.monotonic() - self._started, 3),
            "event": event,
            **facts,
        }
        with self._lock:
            self._stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._stream.flush()

    def stage(self, title: str) -> None:
        """A stage begins."""
        self._step = ""
        self._pace.stage(title)
        self.write("stage", title=title)

    def progress(self, step: str, done: int, total: int) -> None:
        """Write the first of a step, the last, and one a second between them."""
        now = time.monotonic()
        self._pace.progress(step, done, total)
        if step == self._step and done < total and now - self._last < PROGRESS_EVERY:
            return
        self._step, self._last = step, now
        left = {"step_left": self._pace.step_left(), "run_left": self._pace.run_left()}
        told = {name: round(seconds, 1) for name, seconds in left.items() if seconds is not None}
        self.write("progress", step=step, done=done, total=total, **told)

    def expect(self, ahead: Sequence[Ahead]) -> None:
        """What is to come, see :class:`quantkit.system.pace.Expectant`."""
        self._pace.expect(ahead)

    def note(self, text: str) -> None:
        """Something that the user should read."""
        self.write("note", text=text)

    def row(self, title: str) -> Row:
        """A piece of work among others, whose lines have its title as ``task``."""
        return _Task(self, title)


class _Task:
    """The lines of a piece of work among others."""

    def __init__(self, log: EventLog, title: str) -> None:
        self._log, self._title, self._step, self._last = log, title, "", 0.0
        log.write("task", task=title)

    def stage(self, title: str) -> None:
        self.note(title)

    def progress(self, step: str, done: int, total: int) -> None:
        now = time.monotonic()
        if step != self._step or done == total or now - self._last >= PROGRESS_EVERY:
            self._step, self._last = step, now
            self._log.write("progress", task=self._title, step=step, done=done, total=total)

    def note(self, text: str) -> None:
        self._log.write("note", task=self._title, text=text)

    def placed(self, host: str) -> None:
        self._log.write("placed", task=self._title, host=host)

    def close(self) -> None:
        self._log.write("ended", task=self._title)


@contextmanager
def event_log(file: Path, **facts: Any) -> Iterator[EventLog]:
    """Append to a log what happens inside the block, its ``start`` with ``facts``, and how it ended if it raised.

    Raises:
        OutputError: the file cannot be written.
    """
    with translated_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("a", encoding="utf-8")
    with stream:
        log = EventLog(stream)
        log.write("start", **facts)
        try:
            yield log
        except BaseException as error:
            log.write("error", kind=type(error).__name__, text=str(error))
            raise
