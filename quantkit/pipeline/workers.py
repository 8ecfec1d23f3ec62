"""Where the heavy parts of a run are done: here, one after another, or elsewhere, many at a time.

A run says what is to be done by functions that can be pickled and are told to whom progress goes; it does not know by
whom they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from quantkit.system.progress import Observer

if TYPE_CHECKING:
    from quantkit.system.devices import Devices

T = TypeVar("T")
Work = Callable[[Observer], T]


@dataclass(frozen=True, slots=True)
class Task:
    """What a piece of work is called, what it takes, and what it writes.

    Attributes:
        title: for people.
        device: on which it computes, as a recipe names it.
        devices: over which it is dealt, likewise.
        memory: bytes of the CPU's, as estimated; 0 where that is not known.
        reads: files that a node must see.
        outputs: the folders that it alone writes, whose locks are its own.
    """

    title: str
    device: str = "auto"
    devices: Devices = None
    memory: int = 0
    reads: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()


class Workers(Protocol):
    """Who does the work of a run."""

    @property
    def parallel(self) -> int:
        """How many pieces of work are done at a time."""

    def share(self, folder: Path) -> AbstractContextManager[None]:
        """Inside the block, the folder of a run is to be seen by all who work."""

    def keep(self, files: Sequence[Path]) -> None:
        """Keep files that lie beside the folders of runs where these are kept as well."""

    def do(self, task: Task, work: Work[T], observer: Observer) -> T:
        """Have a piece of work done, and wait for it."""

    def each(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Call functions that have work done and wait for it; at a time as many as do not wait for each other."""

    def soon(self, job: Callable[[], T]) -> Callable[[], T]:
        """Begin to call a function; what is returned gives its result, and waits for it."""


class Here:
    """The process itself, which does one thing after another."""

    parallel = 1

    def share(self, folder: Path) -> AbstractContextManager[None]:
        """It is seen here."""
        return nullcontext()

    def keep(self, files: Sequence[Path]) -> None:
        """They are here."""

    def do(self, task: Task, work: Work[T], observer: Observer) -> T:
        """Do it now."""
        observer.stage(task.title)
        return work(observer)

    def each(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Call them in their order."""
        return [job() for job in jobs]

    def soon(self, job: Callable[[], T]) -> Callable[[], T]:
        """Call it now."""
        done = job()
        return lambda: done


HERE = Here()
