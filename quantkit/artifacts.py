"""What travels between the stages: folders and JSON files with a fingerprint, complete or absent.

Every stage writes one folder. It is built under a temporary name beside its place and renamed when it is
whole; its ``stage.json``, written last, holds the fingerprint of everything that it was made from. A stage
whose folder has the fingerprint that is wanted is done.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.errors import OutputError

STAGE_FILE = "stage.json"
ELSEWHERE = "name another output folder"
REMEDIES = {
    errno.ENOSPC: "free some disk space and run the same command again; what is finished is kept",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "the file system or a limit of this session (ulimit -f) allows no file of this size",
    errno.EIO: "the disk reports a fault: name an output folder on another one",
    errno.EROFS: f"the file system is read-only: {ELSEWHERE}",
    errno.EACCES: f"no permission: {ELSEWHERE} or change its permissions",
    errno.EPERM: f"no permission: {ELSEWHERE} or change its permissions",
    errno.EEXIST: f"a part of the path is a file: {ELSEWHERE}",
    errno.ENOTDIR: f"a part of the path is a file: {ELSEWHERE}",
    errno.ENAMETOOLONG: f"the path is too long: {ELSEWHERE}",
}
"""What the user can do about each refusal of the operating system to write."""


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a half.

    Raises:
        OutputError: the folder is read-only, the disk full.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old file or the new one, never a half.

    Raises:
        OutputError: the folder is read-only, the disk full.
    """
    with translated_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at ``path`` whole when the block ends well, and not at all otherwise.

    What stood at ``path`` before is kept until the new folder is whole, then replaced.

    Raises:
        OutputError: the folder cannot be written, or ``path`` holds files that no quantkit stage wrote.
    """
    with translated_os_errors(path):
        check_writable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.partial-"))
        try:
            os.chmod(temporary, 0o755)
            yield temporary
            _replace_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_writable(path: Path) -> None:
    """Check before any work that a stage's folder can be written at ``path``.

    Raises:
        OutputError: ``path`` is a file or a foreign folder, or no folder can be made there.
    """
    try:
        if path.is_dir() and any(path.iterdir()) and not (path / STAGE_FILE).exists():
            raise OutputError(f"{path} exists and was not written by quantkit", f"{ELSEWHERE}, or remove it yourself")
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} exists and is not a folder", ELSEWHERE)
        _check_parent(path)
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, ELSEWHERE)
        raise OutputError(f"cannot write {path}: {error.strerror}", remedy) from error


def _check_parent(path: Path) -> None:
    """Make a folder and remove it again in the nearest folder above ``path`` that there is."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{parent} is not a folder", ELSEWHERE)
    os.rmdir(tempfile.mkdtemp(dir=parent, prefix=".quantkit-probe-"))


def write_stage(folder: Path, stage: str, made_from: dict[str, Any], **facts: Any) -> str:
    """Write ``stage.json`` into a stage's folder and return the fingerprint of ``made_from``."""
    mark = fingerprint({"stage": stage, **made_from})
    write_json(folder / STAGE_FILE, {"stage": stage, "fingerprint": mark, "made_from": made_from, **facts})
    return mark


def read_stage(folder: Path, stage: str, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The ``stage.json`` of a finished stage made from exactly ``made_from``, or None."""
    try:
        written = read_json(folder / STAGE_FILE)
    except (OSError, ValueError):
        return None
    wanted = fingerprint({"stage": stage, **made_from})
    same = isinstance(written, dict) and written.get("fingerprint") == wanted
    return written if same else None


@contextmanager
def translated_os_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise OutputError(f"cannot write {path}: {error.strerror}", REMEDIES[error.errno]) from error


def _replace_folder(new: Path, place: Path) -> None:
    if not place.exists():
        os.rename(new, place)
        return
    aside = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.old-"))
    os.rename(place, aside / "folder")
    try:
        os.rename(new, place)
    except BaseException:
        os.rename(aside / "folder", place)
        os.rmdir(aside)
        raise
    shutil.rmtree(aside)
