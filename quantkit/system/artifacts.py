"""What travels between the stages: folders and JSON files with a fingerprint, complete or absent.

Every stage writes one folder. It is built under a temporary name beside its place and renamed when it is
whole; its ``stage.json``, written last, holds the fingerprint of everything that it was made from. A stage
whose folder has the fingerprint that is wanted is done.
"""

from __future__ import annotations

import errno
import glob
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
from quantkit.system.guests import OURS, own_files, take_along
from quantkit.system.locks import alone, check_held
from quantkit.system.os_errors import ELSEWHERE, REMEDIES, translated_os_errors

__all__ = [
    "ELSEWHERE",
    "REMEDIES",
    "STAGE_FILE",
    "check_writable",
    "clear_up",
    "file_sha256",
    "fingerprint",
    "new_folder",
    "read_json",
    "read_stage",
    "translated_os_errors",
    "write_json",
    "write_stage",
    "write_text",
]

STAGE_FILE = "stage.json"


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file.

    Raises:
        OSError: there is none, or it is no plain file, such as a pipe that would never end.
        ValueError: it is not JSON in UTF-8, or nested too deeply.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def mapping_or_nothing(path: Path) -> dict[str, Any]:
    """A JSON file that is a mapping; anything else is empty here, and refused by who cannot go without."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a half.

    Raises:
        OutputError: the folder is read-only, the disk full.
    """
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """JSON as people read it, which is how it is written."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old file or the new one, never a half.

    Raises:
        OutputError: the folder is read-only, the disk full.
    """
    with translated_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.partial-")
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
def new_folder(path: Path, *, guests: bool = False) -> Iterator[Path]:
    """A folder that appears at ``path`` whole when the block ends well, and not at all otherwise.

    What stood at ``path`` before is kept until the new folder is whole, then replaced. One process at a time makes it;
    what a killed one left of its own is removed.

    Args:
        path: of the folder.
        guests: people may put files of theirs into it, which stay there when it is written anew.

    Raises:
        OutputError: the folder cannot be written, another process writes it, or ``path`` holds files that no quantkit
            stage wrote.
    """
    with translated_os_errors(path):
        check_writable(path)
        with alone(path, "writing it"):
            clear_up(path)
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.partial-"))
            try:
                os.chmod(temporary, 0o755)
                yield temporary
                if guests:
                    _list_own(temporary)
                check_held(path)
                _replace_folder(temporary, path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise


def clear_up(path: Path) -> None:
    """Remove what a killed process left of an output; what it had put aside comes back if nothing is in its place.

    The lock is held, so that nobody else is at it.
    """
    name = glob.escape(f".{path.name}")
    for aside in sorted(path.parent.glob(f"{name}.old-*")):
        if not path.exists() and (aside / "folder").exists():
            os.rename(aside / "folder", path)
        take_along(aside / "folder", path, STAGE_FILE)
        shutil.rmtree(aside, ignore_errors=True)
    for orphan in path.parent.glob(f"{name}.partial-*"):
        if orphan.is_dir():
            shutil.rmtree(orphan, ignore_errors=True)
        else:
            orphan.unlink(missing_ok=True)


def check_writable(path: Path, *, stage: str | None = None, source: str | Path = "") -> None:
    """Check before any work that a stage's folder can be written at ``path``.

    Args:
        path: of the folder.
        stage: that will write it; what another one wrote there is not replaced.
        source: what is read meanwhile, and so not replaced either.

    Raises:
        OutputError: ``path`` is a file, a foreign folder, another stage's or the source itself, or no folder can be
            made there.
    """
    try:
        if source and path.exists() and Path(source).expanduser().exists() and path.samefile(Path(source).expanduser()):
            raise OutputError(f"{path} is the model that is read, which would be replaced", ELSEWHERE)
        if path.is_dir() and any(path.iterdir()) and not (path / STAGE_FILE).exists():
            raise OutputError(f"{path} exists and was not written by quantkit", f"{ELSEWHERE}, or remove it yourself")
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} exists and is not a folder", ELSEWHERE)
        _check_stage(path, stage)
        _check_parent(path)
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, ELSEWHERE)
        raise OutputError(f"cannot write {path}: {error.strerror}", remedy) from error


def _check_stage(path: Path, stage: str | None) -> None:
    file = path / STAGE_FILE
    if stage is None or not file.exists():
        return
    try:
        written = read_json(file)["stage"]
    except (ValueError, KeyError, TypeError):  # a broken one is written anew
        return
    if written != stage:
        raise OutputError(f"{path} holds what another command wrote (its {STAGE_FILE} says {written!r})", ELSEWHERE)


def _check_parent(path: Path) -> None:
    """Make a file without a name in the nearest folder above ``path`` that there is; a kill leaves nothing of it."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{parent} is not a folder", ELSEWHERE)
    tempfile.TemporaryFile(dir=parent, prefix=".quantkit-probe-").close()


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
    take_along(aside / "folder", place, STAGE_FILE)
    shutil.rmtree(aside)


def _list_own(folder: Path) -> None:
    """Have ``stage.json`` list the files of a folder."""
    write_json(folder / STAGE_FILE, {**read_json(folder / STAGE_FILE), OURS: own_files(folder)})
