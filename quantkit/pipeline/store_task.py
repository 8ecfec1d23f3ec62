"""A piece of work on a node that shares no folder with others.

What it needs comes from object storage into a folder of its own, and what it makes goes back whole; so does, at each
step, the state from which it would go on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from quantkit.errors import OutputError, QuantkitError
from quantkit.pipeline.moved_paths import packed, unpacked
from quantkit.pipeline.store import Store
from quantkit.pipeline.store_units import OWNERS, Listing, Units, is_state, related, units_in
from quantkit.system.locks import held
from quantkit.system.os_errors import translated_os_errors
from quantkit.system.progress import Observer

RUNS, OUTSIDE, HERE = "runs", "outside", "here"
"""Folders of a task: of the runs, of what lies outside of them, and that from which relative paths lead."""
SAVE_EVERY = 2.0
"""Seconds between two looks at what would be saved, without a step of progress."""
KEPT_SECONDS = 24 * 3600.0
"""How long files that were brought stay for further tasks of the node after they were last used."""


@dataclass(frozen=True, slots=True)
class Returned:
    """What a piece of work gives back.

    Attributes:
        content: its value, see :mod:`quantkit.pipeline.moved_paths`.
        units: of the store that it wrote.
    """

    content: bytes
    units: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredWork:
    """A piece of work whose files lie in object storage.

    Attributes:
        url: of the store.
        title: of the work, by which those that do it are told from others.
        content: the work, see :mod:`quantkit.pipeline.moved_paths`.
        runs: names of the runs whose folders it sees.
        paths: what it names in the store.
        inputs: units that lie outside of runs, by where they go in the folder of the task.
        owner: of the runs: who asks for the work.
    """

    url: str
    title: str
    content: bytes
    runs: tuple[str, ...]
    paths: tuple[str, ...]
    inputs: Mapping[str, str]
    owner: str

    def __call__(self, observer: Observer) -> Returned:
        """Do it.

        Raises:
            OutputError: the store does not answer, or refuses; the work was begun again elsewhere meanwhile.
        """
        with _scratch() as (cache, folder), _inside(folder / HERE if self._has_relative() else None):
            task = _Task(self, Units(Store(self.url)), folder, observer)
            task.begin(cache)
            roots = self.roots(folder)
            try:
                work = unpacked(self.content, roots)
                with _Saving(observer, task.save_states) as watching:
                    value = work(watching)
            except BaseException:
                with suppress(QuantkitError, OSError):  # logs, and states of what has failed
                    task.save()
                raise
            task.save()
            return Returned(packed(value, roots).content, tuple(task.written))

    def roots(self, folder: Path) -> dict[str, Path]:
        """The folders of the paths in it."""
        inputs = {place: folder / place for place in self.inputs}
        return {**{f"{RUNS}/{name}": folder / RUNS / name for name in self.runs}, **inputs}

    def _has_relative(self) -> bool:
        return any(place.startswith(f"{HERE}/") for place in self.inputs)


@dataclass(slots=True)
class _Task:
    """The files of a piece of work.

    Attributes:
        work: it.
        units: of the store.
        folder: its own.
        observer: is told what is brought.
        token: by which this attempt is told from others.
        written: units that it has written.
    """

    work: StoredWork
    units: Units
    folder: Path
    observer: Observer
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    written: dict[str, None] = field(default_factory=dict)
    _found: dict[str, Listing] = field(default_factory=dict)
    _states: dict[str, None] = field(default_factory=dict)

    def begin(self, cache: Path) -> None:
        """Say whose the work is now, and bring what it needs."""
        for owner in self._owners():
            self.units.store.write(owner, self.token.encode())
        for run in self.work.runs:
            (self.folder / RUNS / run).mkdir(parents=True, exist_ok=True)
        wanted = {unit: self.folder / RUNS / unit for unit in self._needed()}
        wanted |= {unit: self.folder / place for place, unit in self.work.inputs.items()}
        for number, (unit, place) in enumerate(wanted.items(), 1):
            self.observer.progress("fetch", number, len(wanted))
            fetch = self.units.fetch if is_state(unit) else _cached(self.units, cache)
            if self.units.pull(unit, place, fetch):
                self._found[unit] = self.units.known[unit]
            elif unit in self.work.inputs.values():
                raise OutputError(f"{self.work.url} has lost {unit}", "run the same command again")
            if is_state(unit):
                self._states[unit] = None

    def _needed(self) -> list[str]:
        known = [unit for run in self.work.runs for unit in self.units.names(run)]
        return [unit for unit in known if any(related(unit, path) for path in self.work.paths)]

    def save(self) -> None:
        """Bring all that is new into the store: stages first, then states, and out of it the states that are done."""
        units = self._here()
        for unit, place in sorted(units.items(), key=lambda each: is_state(each[0])):
            self._push(unit, place)
        for unit in [each for each in self._states if each not in units]:
            self._check()
            self.units.remove(unit)
            del self._states[unit]

    def save_states(self) -> None:
        """Bring the states from which it would go on into the store, as far as they are new."""
        for unit, place in self._here().items():
            if is_state(unit):
                self._push(unit, place)
                self._states[unit] = None

    def _here(self) -> dict[str, Path]:
        """The units that lie here."""
        folder = self.folder / RUNS
        runs = [folder / run for run in self.work.runs]
        return {each.relative_to(folder).as_posix(): each for run in runs for each in units_in(run)}

    def _push(self, unit: str, place: Path) -> None:
        listing = self.units.digests.listing(place)
        if listing and listing != self._found.get(unit):
            self._check()
            self.units.push(unit, place)
            self._found[unit] = listing
            if not is_state(unit):
                self.written[unit] = None

    def _check(self) -> None:
        """Refuse to write what another attempt, or another run, is at by now."""
        store = self.units.store
        for owner, token in {**dict.fromkeys(self._owners(), self.token), **self._askers()}.items():
            if store.read(owner) != token.encode():
                raise OutputError(f"{self.work.title} was begun again elsewhere", "leave it to who does it now")

    def _owners(self) -> list[str]:
        key = hashlib.sha256(self.work.title.encode()).hexdigest()[:16]
        return [f"{OWNERS}/{run}/{key}" for run in self.work.runs]

    def _askers(self) -> dict[str, str]:
        return {run_owner(run): self.work.owner for run in self.work.runs}


def run_owner(run: str) -> str:
    """The object that says who runs a run."""
    return f"{OWNERS}/{run}/run"


class _Saving:
    """Passes on what is told, and saves states meanwhile: soon after each step of progress, and now and then."""

    def __init__(self, observer: Observer, save: Callable[[], None]) -> None:
        self._observer, self._save = observer, save
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._woken, self._ended = threading.Event(), False
        self._failure: QuantkitError | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._woken.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._woken.wait(SAVE_EVERY)
            if self._ended:
                return
            self._woken.clear()
            try:
                self._save()
            except QuantkitError as error:
                self._failure = error  # which the next step of the work raises
                return
            except OSError:  # of a file that was moved while it was looked at
                continue

    def stage(self, title: str) -> None:
        self._observer.stage(title)

    def progress(self, step: str, done: int, total: int) -> None:
        self._observer.progress(step, done, total)
        if self._failure is not None:
            raise self._failure
        self._woken.set()

    def note(self, text: str) -> None:
        self._observer.note(text)


def _cached(units: Units, cache: Path) -> Callable[[str, tuple[str, int], Path], None]:
    """Brings a file to the node once, for all of its tasks."""
    from filelock import FileLock

    def fetch(name: str, digest: tuple[str, int], file: Path) -> None:
        kept = cache / digest[0]
        with FileLock(cache / f"{digest[0]}.lock"):
            if not kept.is_file() or kept.stat().st_size != digest[1]:
                new = kept.with_suffix(f".{uuid.uuid4().hex}")
                units.fetch(name, digest, new)
                os.replace(new, kept)
            os.utime(kept)
        try:
            os.link(kept, file)
        except OSError:  # a file system without links
            shutil.copyfile(kept, file)

    return fetch


@contextmanager
def _scratch() -> Iterator[tuple[Path, Path]]:
    """The folder of files that stay, and one for this task alone, where this machine has its temporary files."""
    home = Path(tempfile.gettempdir()) / f"quantkit-store-{_user()}"
    cache = home / "files"
    with translated_os_errors(home):
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if home.is_symlink() or (hasattr(os, "getuid") and home.stat().st_uid != os.getuid()):
            raise OutputError(f"{home} is another user's", "set TMPDIR on that node")
        cache.mkdir(exist_ok=True)
        _tidy(home, cache)
        folder = home / f"task-{uuid.uuid4().hex}"
        with held(folder, "a task"):
            folder.mkdir()
            try:
                yield cache, folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def _tidy(home: Path, cache: Path) -> None:
    """Remove what killed tasks left, and files that nobody has asked for since long."""
    for left in home.glob("task-*"):
        with suppress(OutputError), held(left, "clearing up"):
            shutil.rmtree(left, ignore_errors=True)
    now = datetime.now(UTC).timestamp()
    for file in cache.iterdir():
        with suppress(OSError):
            if now - file.stat().st_mtime > KEPT_SECONDS:
                file.unlink()


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else "user"


@contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    """Inside the block relative paths lead from a folder, if there is one."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
