"""An adapter from an archive: what is needed of it, unpacked without trusting it."""

from __future__ import annotations

import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from quantkit.errors import SourceError
from quantkit.system.artifacts import translated_os_errors

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
WANTED = (".json", ".safetensors", ".jinja", ".txt", ".model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONFIG = "adapter_config.json"
MAX_MEMBERS = 4096
MAX_BYTES = 64 << 30
MAX_SIDE_BYTES = 256 << 20
"""Bytes of a file that is no safetensors."""
CHUNK = 1 << 20
PACK_AGAIN = "pack the adapter's folder again, as it is"
BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, ValueError,
    LookupError, NotImplementedError, RuntimeError,
)  # fmt: skip
"""The errors that ``zipfile`` and ``tarfile`` raise for archives that are not whole."""


@dataclass(frozen=True, slots=True)
class _Member:
    """A file of an archive: its path and size as the archive claims them, and how it is read."""

    path: PurePosixPath
    size: int
    opened: Callable[[], IO[bytes] | None]


def is_archive(path: Path) -> bool:
    """Whether a file's name is that of an archive."""
    return path.name.lower().endswith(SUFFIXES)


def unpack(archive: Path, target: Path) -> Path:
    """Unpack the one adapter that an archive holds into ``target``.

    Only files that an adapter is made of are written, under their own names; the folders around them are not made.

    Raises:
        SourceError: the archive is broken, holds no adapter or several, only a pickled one, paths that lead out of it
            or links, or more than an adapter can be.
        OutputError: ``target`` cannot be written.
    """
    try:
        with _opened(archive) as held:
            members = _checked(archive, _members(held))
            home = _home(archive, members)
            total = 0
            for member in members:
                if member.path.parent == home and member.path.suffix in WANTED:
                    total = _write(archive, member, target / member.path.name, total)
    except BROKEN as error:
        raise SourceError(f"{archive} is no readable archive: {error}", PACK_AGAIN) from error
    return target


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as packed:
            yield packed
        return
    with tarfile.open(archive) as tape:
        yield tape


def _members(held: zipfile.ZipFile | tarfile.TarFile) -> Iterator[_Member]:
    """The files; what is neither file nor folder has the size -1."""
    if isinstance(held, zipfile.ZipFile):
        for info in held.infolist():
            if not info.is_dir():
                size = -1 if stat.S_ISLNK(info.external_attr >> 16) else info.file_size
                yield _Member(PurePosixPath(info.filename), size, partial(held.open, info))
        return
    for entry in held:
        if not entry.isdir():
            size = entry.size if entry.isfile() else -1
            yield _Member(PurePosixPath(entry.name), size, partial(held.extractfile, entry))


def _checked(archive: Path, members: Iterator[_Member]) -> list[_Member]:
    found: dict[PurePosixPath, _Member] = {}
    for member in members:
        path = member.path
        if path.is_absolute() or ".." in path.parts or "\\" in str(path) or ":" in str(path):
            raise SourceError(f"{archive} holds '{path}', a path that leads out of it", PACK_AGAIN)
        if member.size < 0:
            raise SourceError(f"{archive} holds '{path}', which is no plain file", PACK_AGAIN)
        if path in found:
            raise SourceError(f"{archive} holds '{path}' twice", PACK_AGAIN)
        found[path] = member
        if len(found) > MAX_MEMBERS:
            raise SourceError(f"{archive} holds more than {MAX_MEMBERS} files", PACK_AGAIN)
    return list(found.values())


def _home(archive: Path, members: list[_Member]) -> PurePosixPath:
    """The folder inside that holds the adapter."""
    homes = [member.path.parent for member in members if member.path.name == CONFIG]
    if len(homes) > 1:
        raise SourceError(f"{archive} holds {len(homes)} adapters", "pack one adapter, its checkpoints left out")
    if not homes:
        raise SourceError(f"{archive} holds no {CONFIG}", "is this the archive of a PEFT adapter?")
    weights = {member.path.suffix for member in members if member.path.parent == homes[0]}
    if ".safetensors" not in weights and weights & set(PICKLES):
        raise SourceError(
            f"{archive} holds only pickled weights, which can run code when they are read",
            "load the adapter with PEFT where you trust it and call save_pretrained, which writes safetensors",
        )
    return homes[0]


def _write(archive: Path, member: _Member, target: Path, total: int) -> int:
    """Write a member and return the bytes written so far; they are counted and not believed."""
    limit = MAX_BYTES if member.path.suffix == ".safetensors" else MAX_SIDE_BYTES
    source = member.opened()
    if source is None:
        raise SourceError(f"{archive} holds '{member.path}', which is no plain file", PACK_AGAIN)
    done = 0
    with source, translated_os_errors(target), target.open("xb") as file:
        while chunk := source.read(CHUNK):
            done += len(chunk)
            if done > limit or total + done > MAX_BYTES:
                raise SourceError(f"{archive}: '{member.path}' is larger than an adapter's file can be", PACK_AGAIN)
            file.write(chunk)
    return total + done
