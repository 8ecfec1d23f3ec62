"""Folders and files of runs in object storage: each whole, with the digest of every file, or absent.

A unit is a stage's folder, a file of a report, or the state from which a stage goes on. Its files lie under their own
names, so that a checkpoint can be loaded from the store by whatever reads there; its listing, written last as one
object, says which they are. What has no listing is not there. Files of a state lie under their digests instead: none
is ever written over, so that a state is the old one or the new one however a machine ends.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from quantkit.errors import OutputError
from quantkit.pipeline.store import GOES_ON, Store
from quantkit.system.artifacts import STAGE_FILE, file_sha256, translated_os_errors

Listing = Mapping[str, tuple[str, int]]
"""The files of a unit by their paths in it: SHA-256 and bytes. A unit that is a file has one, whose path is empty."""
Fetch = Callable[[str, tuple[str, int], Path], None]
"""Brings a file from the store: the name of its object, its digest, and where it goes."""
OWN = ".quantkit"
"""The folder of the store in which all lies that is no result."""
LISTINGS, OWNERS, INPUTS, STATES = f"{OWN}/units", f"{OWN}/owners", f"{OWN}/inputs", f"{OWN}/states"
STATE = re.compile(r"\.(?P<name>.+)\.(layers|training|part\.json)")
"""States from which stages go on, beside their outputs."""
PASSING = re.compile(r"\..*\.(lock|work|spool|(partial|old)(-.*)?)|\.library-.*|\.adapters-.*|\.shared-.*")
"""What is half written, put aside or held meanwhile."""


@dataclass(slots=True)
class Digests:
    """Digests of local files, each taken once for as long as the file stays as it is."""

    _known: dict[tuple[int, int, int, int], str] = field(default_factory=dict)

    def of(self, file: Path) -> tuple[str, int]:
        """SHA-256 and bytes of a file."""
        state = file.stat()
        mark = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        if mark not in self._known:
            self._known[mark] = file_sha256(file)
        return self._known[mark], state.st_size

    def listing(self, path: Path) -> Listing:
        """Of a unit as it lies here; empty where there is nothing."""
        if path.is_file():
            return {"": self.of(path)}
        return {each.relative_to(path).as_posix(): self.of(each) for each in sorted(_files(path))}


@dataclass(slots=True)
class Units:
    """The units of a store.

    Attributes:
        store: it.
        digests: of what lies here.
        known: the listings of units as they were last written or read here.
    """

    store: Store
    digests: Digests = field(default_factory=Digests)
    known: dict[str, Listing] = field(default_factory=dict)

    def names(self, below: str = "") -> list[str]:
        """Units whose files are, or lie in, a folder of the store; and that in which it lies."""
        found = self.store.names(f"{LISTINGS}/{PurePosixPath(below).parts[0]}" if below else LISTINGS)
        units = [each.removeprefix(f"{LISTINGS}/").removesuffix(".json") for each in found]
        return [each for each in units if related(each, below)]

    def listing(self, unit: str) -> Listing | None:
        """What the store has of a unit; None where it is not there."""
        found = _parsed(self.store.read(_listing_of(unit)))
        if found is not None:
            self.known[unit] = found
        return found

    def push(self, unit: str, place: Path, listing: Listing | None = None) -> bool:
        """Bring a unit into the store as it lies here, unless it is there; false if so.

        Args:
            unit: it.
            place: where it lies.
            listing: its files, if not all that lie there.

        Raises:
            OutputError: the store does not answer, or refuses.
        """
        listing = listing or self.digests.listing(place)
        if not listing or self.known.get(unit) == listing:
            return False
        before = self.listing(unit)
        if before == listing:
            return False
        known = {} if before is None else {_object_of(unit, *each): each[1] for each in before.items()}
        old = set(known) if before is not None else set(self.store.names(_folder_of(unit)))
        new = {_object_of(unit, *each): each for each in listing.items()}
        changed = [name for name, (_, digest) in new.items() if known.get(name) != digest]
        if any(name in known for name in changed):
            self.store.remove([_listing_of(unit)])  # from here on until it is whole again it is not there
        for name in changed:
            path, _ = new[name]
            self.store.put(place / path if path else place, name)
        self.store.write(_listing_of(unit), json.dumps(listing, indent=1).encode())
        self.store.remove(sorted(old - set(new)))
        self.known[unit] = listing
        return True

    def pull(self, unit: str, place: Path, fetch: Fetch | None = None) -> bool:
        """Bring a unit here, whole; false if the store has none.

        Args:
            unit: it.
            place: where it will lie; what lies there is replaced.
            fetch: brings a file.

        Raises:
            OutputError: the store does not answer, or has other bytes than were written; it cannot be written here.
        """
        listing = self.listing(unit)
        if listing is None:
            return False
        if self.digests.listing(place) == listing:
            return True
        with translated_os_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.partial-"))
            try:
                whole = aside / "unit"
                for path, digest in listing.items():
                    file = whole / path if path else whole
                    file.parent.mkdir(parents=True, exist_ok=True)
                    (fetch or self.fetch)(_object_of(unit, path, digest), digest, file)
                if place.is_dir():
                    os.rename(place, aside / "before")
                os.replace(whole, place)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return True

    def fetch(self, name: str, digest: tuple[str, int], file: Path) -> None:
        """Bring one object here.

        Raises:
            OutputError: its bytes are not those that were written.
        """
        self.store.get(name, file)
        if self.digests.of(file) != digest:
            raise OutputError(f"{self.store.url}/{name} is not what was written there", f"remove it; {GOES_ON}")

    def remove(self, unit: str) -> None:
        """Take a unit out of the store."""
        listing = self.listing(unit) or {}
        self.store.remove([_listing_of(unit), *sorted({_object_of(unit, *each) for each in listing.items()})])
        self.known.pop(unit, None)


def related(unit: str, path: str) -> bool:
    """Whether a unit is, holds, or lies below what a path names in the store; the state of such a one does, too."""
    place = PurePosixPath(unit)
    if (state := STATE.fullmatch(place.name)) is not None:
        unit = str(place.with_name(state["name"]))
    return not path or unit == path or unit.startswith(f"{path}/") or path.startswith(f"{unit}/")


def units_in(folder: Path, below: Path | None = None) -> Iterator[Path]:
    """The units of a run's folder as they lie here: folders of stages, states, and files that are in neither.

    Args:
        folder: of the run.
        below: the part of it that is looked at.
    """
    start = folder if below is None else below
    while below is not None and start != folder:
        if (start / STAGE_FILE).is_file():
            yield start
            return
        start = start.parent
    start = folder if below is None else below
    if start.is_file():
        yield start
        return
    for each in sorted(start.iterdir()) if start.is_dir() else ():
        if STATE.fullmatch(each.name) or (each / STAGE_FILE).is_file():
            yield each
        elif not each.name.startswith(".") and not PASSING.fullmatch(each.name):
            yield from units_in(folder, each) if each.is_dir() else [each]


def _files(path: Path) -> Iterator[Path]:
    """The files below a folder but for what is half written."""
    for each in sorted(path.iterdir()) if path.is_dir() else ():
        if PASSING.fullmatch(each.name):
            continue
        if each.is_dir():
            yield from _files(each)
        elif each.is_file():
            yield each


def _listing_of(unit: str) -> str:
    return f"{LISTINGS}/{unit}.json"


def _object_of(unit: str, path: str, digest: tuple[str, int]) -> str:
    """The object of a file."""
    if is_state(unit):
        return f"{_folder_of(unit)}/{digest[0]}"
    return f"{unit}/{path}" if path else unit


def _folder_of(unit: str) -> str:
    """Where the objects of a unit lie."""
    return f"{STATES}/{unit}" if is_state(unit) else unit


def is_state(unit: str) -> bool:
    """Whether a unit is a state from which a stage goes on."""
    return STATE.fullmatch(PurePosixPath(unit).name) is not None


def _parsed(content: bytes | None) -> Listing | None:
    """A listing; None where there is none that can be read."""
    try:
        found = json.loads(content or b"")
        return {str(path): (str(sha256), int(size)) for path, (sha256, size) in found.items()}
    except (ValueError, TypeError, AttributeError):
        return None
