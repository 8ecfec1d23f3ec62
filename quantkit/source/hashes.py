"""Files of the hub's cache, compared with the hashes that the hub states of them.

The cache names what it downloads by the hub's ETag, which is the SHA-256 of a large file (of Git LFS) and Git's SHA-1
of any other. So files are compared without the network too. Where a cache cannot make links, its files have other
names, and the hub is asked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantkit.errors import SourceError
from quantkit.system.progress import Observer

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo, ModelInfo

HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SHA1_DIGITS = 40
RepoType = Literal["model", "dataset"]


@dataclass(frozen=True, slots=True)
class Checked:
    """Files that are what the hub states, as far as that is known.

    Attributes:
        sha256: of each file, by name.
        unchecked: names of those whose hash neither the cache nor the hub tells.
    """

    sha256: dict[str, str]
    unchecked: tuple[str, ...]


def check_files(
    name: str,
    files: Mapping[str, Path],
    commit: str,
    *,
    errors: tuple[type[BaseException], ...],
    endpoint: str | None,
    repo_type: RepoType = "model",
) -> Checked:
    """Compare files of a snapshot with what the hub states, reading each of them once.

    Args:
        name: of the repository, ``org/name``.
        files: of the snapshot, by their names in the repository.
        commit: of the snapshot.
        errors: what is raised where the hub cannot be reached; the files are then said to be unchecked.
        endpoint: of the hub; its own by default.
        repo_type: what the repository holds.

    Raises:
        SourceError: a file is not what the hub states.
        OSError: a file cannot be read.
    """
    blobs = {each: file.resolve().name for each, file in files.items()}
    unnamed = [each for each, blob in blobs.items() if not HASH.fullmatch(blob)]
    stated = _asked(name, unnamed, commit, errors, endpoint, repo_type) if unnamed else {}
    sha256: dict[str, str] = {}
    for each, file in files.items():
        wanted = stated.get(each) or blobs[each]
        sha256[each], found = _read(file, wanted)
        if HASH.fullmatch(wanted) and found != wanted:
            kind = "SHA-1 of Git" if len(wanted) == SHA1_DIGITS else "SHA-256"
            raise SourceError(
                f"{each} of {name} is not the file that the hub states: {wanted} is its {kind}, and {found} is "
                f"that of the file here",
                f"remove {file.resolve()} and run the same command again, which downloads it",
            )
    return Checked(sha256, tuple(sorted(each for each in unnamed if each not in stated)))


def tell_unchecked(reference: str, files: Sequence[str], observer: Observer) -> None:
    """Say which files of a hub model were not compared, if there are some."""
    if files:
        observer.note(
            f"{reference}: not compared with the hub, whose hashes are neither in its cache nor to be had: "
            f"{', '.join(files)}"
        )


def _read(path: Path, stated: str) -> tuple[str, str]:
    """The SHA-256 of a file, and what ``stated`` is to be: ``stated`` itself, if it is a hash of the file."""
    sha256 = hashlib.sha256()
    # Git hashes a header before the content; a mirror may state the SHA-1 of the content alone.
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    plain = hashlib.sha1(usedforsecurity=False)
    wanted = (sha256, git, plain) if len(stated) == SHA1_DIGITS else (sha256,)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            for each in wanted:
                each.update(block)
    if len(stated) != SHA1_DIGITS:
        return sha256.hexdigest(), sha256.hexdigest()
    return sha256.hexdigest(), stated if stated == plain.hexdigest() else git.hexdigest()


def _asked(
    name: str,
    files: Collection[str],
    commit: str,
    errors: tuple[type[BaseException], ...],
    endpoint: str | None,
    repo_type: RepoType,
) -> dict[str, str]:
    """The hashes of files that the hub states when it is asked; of none of them, if it cannot be reached."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(endpoint=endpoint)
        found: ModelInfo | DatasetInfo
        if repo_type == "model":
            found = api.model_info(name, revision=commit, files_metadata=True)
        else:
            found = api.dataset_info(name, revision=commit, files_metadata=True)
    except errors:
        return {}
    told = {each.rfilename: each.lfs.sha256 if each.lfs else each.blob_id for each in found.siblings or ()}
    return {file: stated for file, stated in told.items() if file in files and stated and HASH.fullmatch(stated)}
