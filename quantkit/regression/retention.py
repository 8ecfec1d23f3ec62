"""Keep the checkpoints of the last checks and of accepted runs, and remove those that nobody needs any more.

A check works in the recipe's folder, where the next one replaces what changed. What it made is kept beside, in
``runs/NUMBER-MOMENT``: the checkpoints as hard links, which take no room until the next check replaces them. A folder
there is removed file by file, as its ``run.json`` lists them; what somebody else has put there stays.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from quantkit.recipe import RetentionSpec
from quantkit.system.artifacts import read_json, translated_os_errors, write_json
from quantkit.system.progress import Observer

RUNS = "runs"
MARK = "run.json"
VARIANTS = "variants"
REPORTS = ("check.json", "check.html", "check.md", "check.junit.xml", "report.json")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of a check.

    Attributes:
        folder: where.
        run: its number in the history.
        started: when it began.
        files: paths below ``folder``, all that a check has put there.
    """

    folder: Path
    run: int
    started: str
    files: tuple[str, ...]


def keep(folder: Path, run: int, started: str, variants: Collection[str]) -> Path:
    """Keep the checkpoints of the check that has just ended, and return where.

    Args:
        folder: the recipe's.
        run: number in the history.
        started: when the check began.
        variants: those that did not fail.

    Raises:
        OutputError: the folder cannot be written.
    """
    moment = datetime.fromisoformat(started).strftime("%Y%m%dT%H%M%SZ")
    place = folder / RUNS / f"{run:04d}-{moment}"
    wanted = {f"{VARIANTS}/{name}/{path}": folder / VARIANTS / name / path for name, path in _files(folder, variants)}
    with translated_os_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / MARK, {"run": run, "started": started, "files": [*sorted(wanted), *REPORTS]})
        for name, source in wanted.items():
            target = place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(source, target)
    return place


def keep_reports(folder: Path, own: Path) -> None:
    """Keep the reports of the check beside its checkpoints.

    Raises:
        OutputError: the folder cannot be written.
    """
    with translated_os_errors(own):
        for name in REPORTS:
            if (folder / name).is_file():
                _link(folder / name, own / name)


def kept_runs(folder: Path) -> list[Kept]:
    """What is kept in a recipe's folder, the oldest first; folders that no check has made are not among them."""
    found = [_read(place) for place in sorted((folder / RUNS).glob("*")) if place.is_dir() and not place.is_symlink()]
    return sorted((kept for kept in found if kept is not None), key=lambda kept: kept.started)


def checkpoint_of(folder: Path, run: int, started: str, variant: str) -> Path | None:
    """Where the checkpoint of a variant of an earlier check is kept, or None."""
    for kept in kept_runs(folder):
        place = kept.folder / VARIANTS / variant
        if (kept.run, kept.started) == (run, started) and place.is_dir():
            return place
    return None


def clean_up(folder: Path, spec: RetentionSpec, accepted: Collection[int], observer: Observer) -> list[Path]:
    """Remove what the recipe's retention does not keep, and return the folders that are gone.

    Args:
        folder: the recipe's.
        spec: what to keep.
        accepted: numbers of the runs that are references; they are always kept.
        observer: is told of what could not be removed.
    """
    kept = kept_runs(folder)
    newest = {each.folder for each in kept[-spec.runs :]}
    oldest = None if spec.days is None else datetime.now(UTC) - timedelta(days=spec.days)
    removed = []
    for each in kept:
        young = oldest is not None and datetime.fromisoformat(each.started) >= oldest
        if each.run in accepted or each.folder in newest or young:
            continue
        try:
            _remove(each)
        except OSError as error:
            observer.note(f"warning: cannot remove {each.folder}: {error.strerror}")
            continue
        if each.folder.exists():
            observer.note(f"{each.folder} holds files of others, which stay")
        removed.append(each.folder)
    return removed


def _files(folder: Path, variants: Collection[str]) -> Iterator[tuple[str, str]]:
    for name in variants:
        checkpoint = folder / VARIANTS / name
        for path in sorted(checkpoint.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield name, path.relative_to(checkpoint).as_posix()


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copy2(source, target)


def _read(place: Path) -> Kept | None:
    try:
        mark = read_json(place / MARK)
        files = tuple(name for name in mark["files"] if isinstance(name, str) and _is_below(name))
        started = datetime.fromisoformat(mark["started"]).isoformat(timespec="microseconds")
        return Kept(place, int(mark["run"]), started, files)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not made by a check


def _is_below(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _remove(kept: Kept) -> None:
    """Remove the listed files, then every folder that is empty, and last the mark."""
    for name in kept.files:
        path = kept.folder / name
        if not any(parent.is_symlink() for parent in path.parents if kept.folder in parent.parents):
            path.unlink(missing_ok=True)
    for folder in sorted((path for path in kept.folder.rglob("*") if path.is_dir()), reverse=True):
        if not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
    (kept.folder / MARK).unlink(missing_ok=True)
    if not any(kept.folder.iterdir()):
        kept.folder.rmdir()
