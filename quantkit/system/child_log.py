"""The log of a child process: a file that cannot fill the disk, and its last words."""

from __future__ import annotations

import re
import threading
from collections import deque
from pathlib import Path

HEAD_BYTES = 8 << 20
TAIL_BYTES = 1 << 20
LONGEST_LOG_LINE = 300
EMPTY = "(the log is empty)"
ERROR = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b")


class BoundedLog:
    """A file that keeps the beginning of what is written as it comes, and of the rest the end; any thread may write.

    Args:
        file: is replaced.
        head, tail: bytes that are kept of the beginning and of the end.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, file: Path, head: int = HEAD_BYTES, tail: int = TAIL_BYTES) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._out = file.open("wb")
        self._room, self._most = head, tail
        self._tail: deque[bytes] = deque()
        self._held = self._dropped = 0
        self._lock = threading.Lock()
        self._error: OSError | None = None

    def write(self, piece: bytes) -> None:
        """Add some bytes; a full disk is told by :meth:`close`, so that whoever prints need not wait for one."""
        with self._lock:
            if self._error is not None or self._out.closed:
                return
            now, later = piece[: self._room], piece[self._room :]
            try:
                self._out.write(now)
                self._out.flush()
            except OSError as error:
                self._error = error
                return
            self._room -= len(now)
            self._tail.append(later)
            self._held += len(later)
            while self._held - len(self._tail[0]) > self._most:
                self._dropped += len(self._tail[0])
                self._held -= len(self._tail.popleft())

    def close(self) -> None:
        """Write what was kept of the end.

        Raises:
            OSError: the file could not be written.
        """
        with self._lock, self._out:
            if self._error is not None:
                raise self._error
            if self._dropped:
                self._out.write(f"\n[{self._dropped} bytes are left out here]\n".encode())
            self._out.writelines(self._tail)


def last_line(log: Path) -> str:
    """The last line of a log that holds something; progress bars and colours are taken out."""
    lines = _lines(log)
    return lines[-1][:LONGEST_LOG_LINE] if lines else EMPTY


def last_error(log: Path) -> str:
    """The last exception that a log shows, with what follows it; the last line where it shows none."""
    lines = _lines(log)
    errors = [place for place, line in enumerate(lines) if ERROR.match(line)]
    return " ".join(lines[errors[-1] :])[:LONGEST_LOG_LINE] if errors else last_line(log)


def _lines(log: Path) -> list[str]:
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", log.read_text(encoding="utf-8", errors="replace"))
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
