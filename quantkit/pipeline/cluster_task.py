"""What goes to a node of a cluster and comes back: a piece of work, what it tells meanwhile, and how it ended."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.pipeline.workers import Work
from quantkit.system.distribution import own_version

TELL_EVERY = 0.5
"""Seconds between two steps of progress that a task tells."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A piece of work as it goes to a node.

    Attributes:
        work: it.
        version: of quantkit here.
        threads: with which it computes, as bytes depend on their number.
        marks: files that a node sees where it shares the folders in which they lie.
        folder: from which relative paths lead.
    """

    work: Work[Any]
    version: str
    threads: int
    marks: tuple[Path, ...]
    folder: Path


@dataclass(frozen=True, slots=True)
class Done:
    """How a piece of work ended on a node: with a value or an error, or not, as the node does not see ``missing``."""

    node: str
    host: str
    told: int = 0
    value: Any = None
    error: BaseException | None = None
    missing: Path | None = None


class Told:
    """The observer of a task on its node: tells the board, progress now and then.

    Attributes:
        count: of what it has told.
    """

    def __init__(self, board: Any, key: str) -> None:
        self._board, self._key = board, key
        self._last, self._step = 0.0, ""
        self.count = 0

    def _put(self, *event: Any) -> None:
        self.count += 1
        self._board.put.remote(self._key, *event)

    def stage(self, title: str) -> None:
        """Tell it."""
        self._put("stage", title)

    def progress(self, step: str, done: int, total: int) -> None:
        """Tell it, if it is the first of a step, the last, or some time went by."""
        now = time.monotonic()
        if step == self._step and done < total and now - self._last < TELL_EVERY:
            return
        self._step, self._last = step, now
        self._put("progress", step, done, total)

    def note(self, text: str) -> None:
        """Tell it."""
        self._put("note", text)


def perform(sent: Sent, key: str, board: Any) -> Done:
    """What a node does with a piece of work."""
    import ray
    import torch

    node, host = ray.get_runtime_context().get_node_id(), socket.gethostname()
    missing = next((mark for mark in sent.marks if not mark.is_file()), None)
    if missing is not None:
        return Done(node, host, missing=missing)
    board.put.remote(key, "placed", node, host)  # who waits here gives the processor to another task
    observer = Told(board, key)
    try:
        if own_version() != sent.version:
            raise QuantkitError(
                f"node {host} has quantkit {own_version()}, and this is {sent.version}", "install the same on all nodes"
            )
        torch.set_num_threads(sent.threads)
        if sent.folder.is_dir():
            os.chdir(sent.folder)
        value = sent.work(observer)
    except Exception as error:  # whatever it is, it is raised where the work was asked for
        return Done(node, host, observer.count, error=error)
    return Done(node, host, observer.count, value)


def ready() -> None:
    """What a node does first: it loads what most tasks need, so that the first of them need not."""
    import quantkit.evaluation.stage
    import quantkit.quantization  # noqa: F401 - loaded for those who come next


class Board:
    """An actor beside the driver, on which tasks put what they have to tell."""

    def __init__(self) -> None:
        self._events: list[tuple[Any, ...]] = []

    def put(self, *event: Any) -> None:
        """Add an event: the key of a task, its kind, and more."""
        self._events.append(event)

    def take(self) -> list[tuple[Any, ...]]:
        """All since this was last asked."""
        events, self._events = self._events, []
        return events
