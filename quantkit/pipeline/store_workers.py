"""Workers that share no folder: object storage lies between them and the process that asks for the work."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from quantkit.checkpoint.companions import MODEL, code_files, licence_files, matching
from quantkit.errors import OutputError, QuantkitError
from quantkit.pipeline.moved_paths import Packed, packed, unpacked
from quantkit.pipeline.store import Store
from quantkit.pipeline.store_task import HERE, OUTSIDE, RUNS, StoredWork, run_owner
from quantkit.pipeline.store_units import INPUTS, Listing, Units, units_in
from quantkit.pipeline.workers import Task, Work, Workers
from quantkit.system.artifacts import fingerprint
from quantkit.system.progress import Observer

T = TypeVar("T")
LOGS = "logs"
WEIGHTS = ("*.safetensors", "*.json", "*.txt", "README.md")
"""Files of a model beside those that transformers asks for by name."""


class ThroughStore:
    """Has work done by others that reach the same object storage; see :class:`quantkit.pipeline.workers.Workers`.

    Each run has a folder in the store, which is called as its folder here. Before a piece of work goes out, what it
    names goes into the store, and when it is done, what it wrote comes here.

    Args:
        workers: who does the work.
        store: between them and this process.
    """

    def __init__(self, workers: Workers, store: Store) -> None:
        self._workers, self._units = workers, Units(store)
        self._folders: dict[str, Path] = {}
        self._owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
        self._moving = threading.Lock()

    @property
    def parallel(self) -> int:
        """How many pieces of work are done at a time."""
        return self._workers.parallel

    @contextmanager
    def share(self, folder: Path) -> Iterator[None]:
        """Inside the block, the folder of a run is in the store as well; what is there and not here comes here first.

        Raises:
            OutputError: the store does not answer or refuses; two runs would have one folder in it; another process has
                begun the same run in it since.
        """
        run = folder.name
        if run in self._folders:
            raise OutputError(f"two runs would have the folder {run} of {self._units.store.url}", "name one otherwise")
        self._folders[run] = folder
        try:
            with self._moving:
                self._units.store.write(run_owner(run), self._owner.encode())
                for unit in self._units.names(run):
                    place = self._place(unit)
                    if not place.exists() and not place.name.startswith("."):
                        self._units.pull(unit, place)
            try:
                yield
            except BaseException:
                with suppress(QuantkitError, OSError):
                    self._keep(run)
                raise
            self._keep(run)
        finally:
            del self._folders[run]

    def _keep(self, run: str) -> None:
        """Bring all of a run into the store."""
        with self._moving:
            self._check(run)
            for place in units_in(self._folders[run]):
                self._units.push(self._unit(run, place), place)

    def _check(self, run: str) -> None:
        """Refuse to go on with a run that another process has begun since."""
        found = self._units.store.read(run_owner(run))
        if found != self._owner.encode():
            who = " on ".join(reversed((found or b"nobody ?").decode(errors="replace").split()[:2]))
            raise OutputError(f"{self._units.store.url}/{run} was taken over by process {who}", "leave it to that one")

    def keep(self, files: Sequence[Path]) -> None:
        """Bring files that lie beside the folders of runs into the store."""
        for file in files:
            self._units.store.put(file, file.name)

    def do(self, task: Task, work: Work[T], observer: Observer) -> T:
        """Have it done by who reaches the store.

        Raises:
            OutputError: the store does not answer, or refuses.
            QuantkitError: it cannot be done.
        """
        folders = {f"{RUNS}/{run}": folder for run, folder in self._folders.items()}
        outside = self._outside(task)
        sent = packed(work, {**folders, **outside})
        runs = sorted({name.removeprefix(f"{RUNS}/") for name, _ in sent.paths if name in folders})
        named = [f"{name.removeprefix(f'{RUNS}/')}/{path}" for name, path in sent.paths if name in folders]
        paths = sorted(path.removesuffix("/.") for path in named)
        with self._moving:
            for run in runs:
                self._check(run)
            for path in paths:
                self._bring(path)
            inputs = {name: self._input(place, _model_files(place)) for name, place in outside.items()}
            inputs |= self._relative(sent)
        url = self._units.store.url
        stored = StoredWork(url, task.title, sent.content, tuple(runs), tuple(paths), inputs, self._owner)
        done = self._workers.do(replace(task, reads=(), outputs=()), stored, observer)
        with self._moving:
            for unit in done.units:
                self._units.pull(unit, self._place(unit))
        value: T = unpacked(done.content, {**folders, **outside})
        return value

    def each(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Call functions that have work done and wait for it."""
        return self._workers.each(jobs)

    def soon(self, job: Callable[[], T]) -> Callable[[], T]:
        """Begin to call a function."""
        return self._workers.soon(job)

    # What lies where

    def _place(self, unit: str) -> Path:
        """Where a unit lies here."""
        run, _, path = unit.partition("/")
        return self._folders[run] / path

    def _unit(self, run: str, place: Path) -> str:
        return f"{run}/{place.relative_to(self._folders[run]).as_posix()}"

    def _bring(self, path: str) -> None:
        """Bring what a path of the store names into it, as far as it lies here."""
        run, _, below = path.partition("/")
        folder = self._folders[run]
        for place in units_in(folder, folder / below if below else None):
            if below or place.relative_to(folder).parts[0] != LOGS:  # what is written meanwhile
                self._units.push(self._unit(run, place), place)

    def _outside(self, task: Task) -> dict[str, Path]:
        """What a piece of work reads that lies in no run's folder, such as a model of the hub."""
        found: dict[str, Path] = {}
        for file in task.reads:
            place = file.absolute()
            if not any(place.is_relative_to(folder.absolute()) for folder in self._folders.values()):
                place = place if place.suffix == ".gguf" else place.parent
                found[f"{OUTSIDE}/{len(found)}/{place.name}"] = place
        return found

    def _input(self, place: Path, files: Sequence[Path]) -> str:
        """Bring files from outside of runs into the store, once for all that read them; the name of their unit."""
        digests = self._units.digests
        listing: Listing = {
            "" if file == place else file.relative_to(place).as_posix(): digests.of(file) for file in files
        }
        unit = f"{INPUTS}/{fingerprint(listing)[:16]}"
        self._units.push(unit, place, listing)
        return unit

    def _relative(self, sent: Packed) -> dict[str, str]:
        """Bring files that recipes name by relative paths, which lead from where the task is done."""
        found = {}
        for path in sorted(sent.files):
            place = Path(path)
            if place.is_absolute() or ".." in place.parts or not place.exists():
                continue  # nodes have it at the same place, or say that they do not
            files = sorted(each for each in place.rglob("*") if each.is_file()) if place.is_dir() else [place]
            found[f"{HERE}/{place.as_posix()}"] = self._input(place, files)
        return found


def _model_files(place: Path) -> list[Path]:
    """The files of a model's folder, and no others that lie there."""
    if place.is_file():
        return [place]
    return sorted({*matching(place, (*MODEL, *WEIGHTS)), *code_files(place), *licence_files(place)})
