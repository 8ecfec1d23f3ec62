"""What a worker prints, in a file that cannot fill the disk."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path
from typing import IO

CHUNK = 1 << 16
HEAD_BYTES = 8 << 20
TAIL_BYTES = 1 << 20


class LogCopy:
    """Copies a stream into a file: its beginning as it comes, and of the rest the end.

    Args:
        stream: of the worker.
        file: is replaced.
        head, tail: bytes that are kept of the beginning and of the end.
    """

    def __init__(self, stream: IO[bytes], file: Path, head: int = HEAD_BYTES, tail: int = TAIL_BYTES) -> None:
        self._stream, self._file, self._head, self._tail = stream, file, head, tail
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def finish(self, patience: float) -> None:
        """Wait until the stream has ended, which it has when nobody is left that could write to it.

        Raises:
            OSError: the file could not be written.
        """
        self._thread.join(patience)
        if self._error is not None:
            raise self._error

    def _copy(self) -> None:
        written, dropped, held = 0, 0, 0
        tail: deque[bytes] = deque()
        try:
            with self._file.open("wb") as out:
                while piece := self._stream.read1(CHUNK):  # type: ignore[attr-defined]  # a pipe of Popen is buffered
                    now = piece[: max(self._head - written, 0)]
                    out.write(now)
                    out.flush()
                    written += len(now)
                    tail.append(piece[len(now) :])
                    held += len(tail[-1])
                    while held - len(tail[0]) > self._tail:
                        dropped += len(tail[0])
                        held -= len(tail.popleft())
                if dropped:
                    out.write(f"\n[{dropped} bytes are left out here]\n".encode())
                out.writelines(tail)
        except OSError as error:
            self._error = error
            while self._stream.read(CHUNK):  # whoever prints must not wait for a full disk
                pass
