"""A model of the Hugging Face hub, downloaded to its cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from quantkit.checkpoint.companions import MODEL, TOKENIZERS
from quantkit.errors import SourceError
from quantkit.recipe.model import HUB_REFERENCE
from quantkit.source.hashes import check_files
from quantkit.system.artifacts import translated_os_errors

WANTED = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "README.md",
    *(pattern for pattern in TOKENIZERS if "/" not in pattern),
    *("LICEN[SC]E*", "licen[sc]e*", "NOTICE*", "COPYING*", "COPYRIGHT*", "USE_POLICY*", "ACCEPTABLE_USE*"),
]
UNWANTED = ["*/*", "consolidated*"]
BELOW = [pattern for pattern in MODEL if "/" in pattern]
"""What of a model lies in folders of its repository: further chat templates, and how embeddings are pooled."""
UNWANTED_BELOW = ["*/*/*"]
OWN_OF_MISTRAL = "params.json"
IN_OWN_LAYOUT = f"holds a model in Mistral's own layout alone ({OWN_OF_MISTRAL}, consolidated.safetensors)"
OTHER_LAYOUT = "give it in the layout of transformers, with config.json"
# huggingface_hub has changed the HTTP package beneath it; its own errors derive from that package's base error.
TRANSPORT_ERROR: type[BaseException] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A downloaded revision, whose files are what the hub states.

    Attributes:
        folder: it.
        revision: its commit.
        sha256: of each file that was wanted, by name.
        unchecked: names of those whose hash could not be learnt from the hub or its cache.
    """

    folder: Path
    revision: str
    sha256: dict[str, str]
    unchecked: tuple[str, ...]


def download(reference: str, revision: str | None, *, trust_remote_code: bool) -> Snapshot:
    """Download the model ``org/name`` or ``org/name@revision``, or find it in the cache.

    Pickled weights are never downloaded, and Python files only with ``trust_remote_code``. Every file is compared with
    the hash that the hub states of it, each time.

    Raises:
        SourceError: the hub cannot be reached and the model is not in the cache, there is no such model or
            revision, it may not be read without a token, it has no safetensors, or a file is not what the hub states.
        OutputError: the cache cannot be written.
    """
    match = HUB_REFERENCE.fullmatch(reference)
    if match is None:
        raise SourceError(f"'{reference}' is not the name of a hub model", "write org/name or org/name@revision")
    if revision and match["revision"] and revision != match["revision"]:
        raise SourceError(
            f"model.source asks for revision '{match['revision']}' and model.revision for '{revision}'", "keep one"
        )
    name, revision = match["id"], revision or match["revision"]
    endpoint, wanted = os.environ.get("HF_ENDPOINT"), [*WANTED, "*.py"] if trust_remote_code else WANTED
    try:
        with translated_os_errors(Path(constants.HF_HUB_CACHE)):
            fetch = partial(snapshot_download, name, endpoint=endpoint)
            folder = Path(fetch(revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED))
            fetch(revision=folder.name, allow_patterns=BELOW, ignore_patterns=UNWANTED_BELOW)
    except (HFValidationError, OSError, TRANSPORT_ERROR) as error:
        raise translated_error(name, revision, error) from error
    if not any(folder.glob("*.safetensors")):
        if (folder / OWN_OF_MISTRAL).exists():
            raise SourceError(f"hub model {name} {IN_OWN_LAYOUT}", OTHER_LAYOUT)
        raise SourceError(
            f"hub model {name} has no safetensors at the top of its repository",
            "choose a model or revision that has, or convert the weights where you trust them",
        )
    with translated_os_errors(folder):
        there = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        named = {each: there[each] for each in sorted(there) if _is_wanted(each, wanted)}
        checked = check_files(name, named, folder.name, errors=(OSError, TRANSPORT_ERROR), endpoint=endpoint)
    return Snapshot(folder, folder.name, checked.sha256, checked.unchecked)


def _is_wanted(file: str, wanted: Sequence[str]) -> bool:
    """Whether it was to be downloaded: the cache may hold what other programs have read."""
    patterns, unwanted = (BELOW, UNWANTED_BELOW) if "/" in file else (wanted, UNWANTED)
    is_unwanted = any(fnmatchcase(file, pattern) for pattern in unwanted)
    return not is_unwanted and any(fnmatchcase(file, pattern) for pattern in patterns)


def translated_error(name: str, revision: str | None, error: BaseException) -> SourceError:
    """One line with the remedy; the foreign message stays behind, since it can be long and hold request headers."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, RevisionNotFoundError):
        return SourceError(f"hub model {name} has no revision '{revision}'", "check the branch, tag or commit")
    if isinstance(error, GatedRepoError):
        return SourceError(
            f"hub model {name} is gated",
            "accept its terms on its page, then set the environment variable HF_TOKEN to a token that may read it",
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        return SourceError(
            f"there is no hub model {name} that you may read, and no folder of that name here",
            "check the name; for a private model set the environment variable HF_TOKEN",
        )
    if isinstance(error, HFValidationError):
        return SourceError(f"'{name}' is not the name of a hub model", "write org/name or org/name@revision")
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return SourceError(
            f"the hub cannot be reached, and {name} is not in its cache",
            "check the network and HF_HUB_OFFLINE, or give the folder of a model that is here",
        )
    cause = f"status {status}" if status else type(error).__name__
    return SourceError(f"downloading {name} from the hub failed: {cause}", "run the same command again")
