"""Run a worker: watch its time and memory, hear its progress, and leave no process of it behind.

Memory is watched from here, as what the worker and all its processes have resident. A limit that the kernel would
enforce on a single process is no use: CUDA reserves more address space than there is memory (``RLIMIT_AS``), private
mappings count whether they are used or not (``RLIMIT_DATA``), and neither counts the processes that a library starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from quantkit.isolation.log import LogCopy
from quantkit.isolation.outcome import Ending, Kind
from quantkit.isolation.processes import GRACE, MARK, end_all, killed_for_memory, resident_bytes
from quantkit.system.artifacts import read_json, translated_os_errors
from quantkit.system.processes import signal_name
from quantkit.system.units import in_units

BEAT = 0.1
"""Seconds between two looks at a worker."""
FREE_SHARE = 0.9
"""Share of the free memory that a worker may take where no limit is given."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a worker may take.

    Attributes:
        seconds: from its start to its end.
        memory_bytes: resident, with all its processes; None is a share of what is free.
    """

    seconds: float
    memory_bytes: int | None = None

    def memory(self) -> int:
        """The limit in bytes."""
        return self.memory_bytes or int(FREE_SHARE * psutil.virtual_memory().available)


def run_worker(
    command: Callable[[int], Sequence[str]],
    result_file: Path,
    environment: Mapping[str, str],
    limits: Limits,
    log: Path,
    on_progress: Progress,
) -> Ending:
    """Run a worker to its end, or end it.

    Args:
        command: the command line, given the descriptor to which progress is written.
        result_file: where the worker leaves its result; it must not exist. The worker's working folder is the one
            that holds it, so that what a library writes beside itself is not left with the user.
        environment: all variables that the worker has.
        limits: what it may take.
        log: file for all that it prints; replaced if it exists.
        on_progress: called in this thread.

    Raises:
        OutputError: the log cannot be written.
    """
    mark = uuid.uuid4().hex
    with translated_os_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    reading, writing = os.pipe()
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(os.fdopen(reading, "r", encoding="utf-8", errors="replace"))
        try:
            child = subprocess.Popen(
                command(writing),
                env={**environment, MARK: mark},
                cwd=result_file.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        stack.callback(_close, child)
        watch = _Watch(child, mark, limits, killed_for_memory())
        told: queue.SimpleQueue[tuple[str, int, int]] = queue.SimpleQueue()
        threading.Thread(target=_hear, args=(lines, told), daemon=True).start()
        copy = LogCopy(child.stdout, log)  # type: ignore[arg-type]  # a pipe, as was asked for
        try:
            watch.until_the_end(lambda: _tell(told, on_progress))
        finally:
            # the lifeline stays open until here, so that a worker that is asked to end can do so by itself
            end_all(child.pid, mark, patient=not watch.over and not watch.has_ended())
            child.wait()
            with translated_os_errors(log):
                copy.finish(GRACE)
    return watch.ending(result_file, log)


class _Watch:
    """A worker, its limits, and what has been seen of it."""

    def __init__(self, child: subprocess.Popen[bytes], mark: str, limits: Limits, killed_before: int) -> None:
        self.over: Kind | None = None
        self._child, self._mark, self._limits = child, mark, limits
        self._memory = limits.memory()
        self._killed_before = killed_before
        self._started = time.monotonic()
        self._peak = 0

    def until_the_end(self, each_beat: Callable[[], None]) -> None:
        """Return when the worker has ended or is over a limit, which then is in :attr:`over`."""
        while not self.has_ended():
            each_beat()
            resident = resident_bytes(self._child.pid, self._memory)
            self._peak = max(self._peak, resident)
            if resident > self._memory:
                self.over = Kind.MEMORY_LIMIT
                return
            if time.monotonic() - self._started > self._limits.seconds:
                self.over = Kind.TIME_LIMIT
                end_all(self._child.pid, self._mark)
                return
            time.sleep(BEAT)
        each_beat()

    def has_ended(self) -> bool:
        """Whether the worker has ended; it is not waited for, so that its number stays its own."""
        try:
            return psutil.Process(self._child.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def ending(self, result_file: Path, log: Path) -> Ending:
        """How it ended."""
        status, seconds = self._child.returncode, time.monotonic() - self._started
        result: dict[str, Any] | None = read_json(result_file) if result_file.is_file() else None
        limit = {
            Kind.MEMORY_LIMIT: in_units(self._memory),
            Kind.TIME_LIMIT: f"{self._limits.seconds:g} s",
        }.get(self.over or Kind.DONE, "")
        return Ending(self._kind(status, result), status, seconds, self._peak, limit, result, log)

    def _kind(self, status: int, result: dict[str, Any] | None) -> Kind:
        if self.over is not None:
            return self.over
        if status < 0:
            by_kernel = signal_name(-status) == "SIGKILL" and killed_for_memory() > self._killed_before
            return Kind.NO_MEMORY if by_kernel else Kind.SIGNAL
        if result is not None and "error" in result:
            return Kind.NO_MEMORY if result["error"].get("memory") else Kind.ERROR
        if result is None or status != 0:
            return Kind.ERROR if status == 1 else Kind.NO_RESULT
        return Kind.DONE


def _close(child: subprocess.Popen[bytes]) -> None:
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


def _hear(lines: Any, told: queue.SimpleQueue[tuple[str, int, int]]) -> None:
    """Put what a worker tells into a queue, until nobody is left that could tell more."""
    with contextlib.suppress(ValueError, OSError):  # the stream was closed
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                data = json.loads(line)
                told.put((str(data["step"]), int(data["done"]), int(data["total"])))


def _tell(told: queue.SimpleQueue[tuple[str, int, int]], on_progress: Progress) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            on_progress(*told.get_nowait())
