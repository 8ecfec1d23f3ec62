"""A child process: started with a job, watched, and ended with all that it started.

It leads a process group, and bears a mark by which what leaves the group is found; :mod:`quantkit.system.worker` is
what it does for its part. Lines of progress on its standard output are passed on; all else that it prints is its log.

Memory is watched from here, as what the child and all its processes have resident. A limit that the kernel would
enforce on a single process is no use: CUDA reserves more address space than there is memory (``RLIMIT_AS``), private
mappings count whether they are used or not (``RLIMIT_DATA``), and neither counts the processes that a library starts.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from quantkit.system import processes, threads
from quantkit.system.artifacts import read_json, write_json
from quantkit.system.child_log import BoundedLog
from quantkit.system.ending import Ending, Kind
from quantkit.system.os_errors import translated_os_errors
from quantkit.system.shutdown import heed
from quantkit.system.units import in_units
from quantkit.system.worker import JOB_FILE, RESULT_FILE, Report

BEAT = 0.1
"""Seconds between two looks at a child."""
CHUNK = 1 << 16
Step = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a child may take.

    Attributes:
        seconds: from its start to its end; None is as long as it likes.
        memory_bytes: resident, with all its processes; None is not watched.
    """

    seconds: float | None = None
    memory_bytes: int | None = None


class Child:
    """A process that lives inside a ``with`` block at most.

    Args:
        command: the command line.
        environment: all variables that it has, but for those of its threads, which are as here.
        hear: called in another thread with each line of its standard output, and with an empty one at the end.
        log: what it prints on standard error; None drops it.
        cwd: its working folder; by default that of this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        hear: Callable[[bytes], None],
        *,
        log: BoundedLog | None = None,
        cwd: Path | None = None,
    ) -> None:
        self._mark, self._log = uuid.uuid4().hex, log
        self.process = subprocess.Popen(
            command,
            env={**threads.variables(os.environ), **environment, processes.MARK: self._mark},
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if log is None else subprocess.PIPE,
            start_new_session=True,
        )
        self._threads = [_started(_read_lines, self.process.stdout, hear)]
        if log is not None:
            self._threads.append(_started(_read_pieces, self.process.stderr, log.write))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(patient=error is not None)

    def has_ended(self) -> bool:
        """Whether it has ended by itself."""
        return self.process.returncode is not None or processes.has_ended(self.process.pid)

    def send(self, line: bytes) -> None:
        """Write to its standard input.

        Raises:
            OSError: it does not read any more.
        """
        if self.process.stdin is not None:
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def end(self, *, patient: bool) -> None:
        """End it and all that it started; what it said has been heard then.

        Its lifeline stays open until it has ended, so that a child that is asked to end can do so in its own way.

        Args:
            patient: leave it a few seconds for that.
        """
        if self.process.returncode is not None:
            return
        processes.end_all(self.process.pid, self._mark, patient=patient and not self.has_ended())
        self.process.wait()
        for thread in self._threads:
            thread.join(processes.GRACE)
        with suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()


def run_child(
    command: Sequence[str],
    job: Any,
    folder: Path,
    *,
    environment: Mapping[str, str],
    log: Path,
    limits: Limits | None = None,
    cwd: Path | None = None,
    on_progress: Report | None = None,
) -> Ending:
    """Have a child carry out a job, to its end or to a limit.

    Args:
        command: the command line, to which the path of the job's file is appended.
        job: JSON data.
        folder: for the job and its result; no other job has it.
        environment: all variables that the child has.
        log: file for all that it prints; replaced if it exists.
        limits: what it may take.
        cwd: its working folder; by default that of this process.
        on_progress: called in this thread.

    Raises:
        OutputError: the job or the log cannot be written.
        Terminated: somebody asked this process to stop, see :mod:`quantkit.system.shutdown`.
    """
    job_file = folder / JOB_FILE
    write_json(job_file, job)
    told: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
    with translated_os_errors(log):
        written = BoundedLog(log)

    def hear(line: bytes) -> None:
        step = _step(line)
        if step is None:
            written.write(line)
        if step is not None or not line:
            told.put(step)  # None wakes whoever waits for the end

    watch = _Watch(limits or Limits(), told, on_progress)
    try:
        with Child([*command, str(job_file)], environment, hear, log=written, cwd=cwd) as child:
            watch.until_the_end(child)
            child.end(patient=watch.over is Kind.TIME_LIMIT)
    finally:
        with translated_os_errors(log):
            written.close()
    watch.tell(0)
    return watch.ending(child.process.returncode, folder / RESULT_FILE, log)


class _Watch:
    """The limits of a child, and what has been seen of it."""

    def __init__(self, limits: Limits, told: queue.SimpleQueue[Step | None], on_progress: Report | None) -> None:
        self.over: Kind | None = None
        self._limits, self._told, self._on_progress = limits, told, on_progress
        self._killed_before = processes.killed_for_memory()
        self._started = time.monotonic()
        self._peak, self._over_in_words = 0, ""

    def until_the_end(self, child: Child) -> None:
        """Return when the child has ended or is over a limit, which then is in :attr:`over`."""
        while not child.has_ended():
            heed()
            self._look(child.process.pid)
            if self.over is not None:
                return
            self.tell(BEAT)

    def tell(self, patience: float) -> None:
        """Pass on the steps that have come, waiting for the first of them."""
        for _ in range(max(self._told.qsize(), 1)):
            try:
                step = self._told.get(timeout=patience)
            except queue.Empty:
                return
            if step is not None and self._on_progress is not None:
                self._on_progress(*step)

    def _look(self, pid: int) -> None:
        memory, seconds = self._limits.memory_bytes, self._limits.seconds
        if memory is not None:
            resident = processes.resident_bytes(pid, memory)
            self._peak = max(self._peak, resident)
            if resident > memory:
                self.over, self._over_in_words = Kind.MEMORY_LIMIT, in_units(memory)
                return
        if seconds is not None and time.monotonic() - self._started > seconds:
            self.over, self._over_in_words = Kind.TIME_LIMIT, f"{seconds:g} s"

    def ending(self, status: int, result_file: Path, log: Path) -> Ending:
        """How the child ended."""
        seconds = time.monotonic() - self._started
        result: dict[str, Any] | None = read_json(result_file) if result_file.is_file() else None
        return Ending(self._kind(status, result), status, seconds, self._peak, self._over_in_words, result, log)

    def _kind(self, status: int, result: dict[str, Any] | None) -> Kind:
        if self.over is not None:
            return self.over
        if status < 0:
            is_kill = processes.signal_name(-status) == "SIGKILL"
            by_kernel = is_kill and processes.killed_for_memory() > self._killed_before
            return Kind.NO_MEMORY if by_kernel else Kind.SIGNAL
        if result is not None and "error" in result:
            return Kind.NO_MEMORY if result["error"].get("memory") else Kind.ERROR
        if result is None or status != 0:
            return Kind.ERROR if status == 1 else Kind.NO_RESULT
        return Kind.DONE


def _step(line: bytes) -> Step | None:
    """The step of progress that a line tells; None where it tells none."""
    try:
        data = json.loads(line)
        return (str(data["step"]), int(data["done"]), int(data["total"])) if len(data) == 3 else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _started(work: Callable[[IO[bytes], Callable[[bytes], None]], None], stream: Any, take: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=(stream, take), daemon=True)
    thread.start()
    return thread


def _read_lines(stream: IO[bytes], take: Callable[[bytes], None]) -> None:
    """Pass lines on until nobody is left that could write more; an empty one ends them."""
    with stream:
        for line in stream:
            take(line)
    take(b"")


def _read_pieces(stream: IO[bytes], take: Callable[[bytes], None]) -> None:
    with stream:
        while piece := stream.read1(CHUNK):  # type: ignore[attr-defined]  # a pipe of Popen is buffered
            take(piece)
