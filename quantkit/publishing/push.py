"""Upload an exported checkpoint to the Hugging Face hub, in one commit."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from quantkit.errors import CheckpointError, OutputError, QuantkitError
from quantkit.exports.manifest import DESCRIBING, MANIFEST, SIGNATURE, is_whole, read_manifest
from quantkit.system.os_errors import is_file

TOKEN_WANTED = "set the environment variable HF_TOKEN to a token that may write, or log in with 'hf auth login'"
# huggingface_hub has changed the HTTP package beneath it; its own errors derive from that package's base error.
TRANSPORT_ERROR: type[BaseException] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def push(
    folder: Path,
    repository: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Upload the files that a checkpoint's manifest lists, it, its signature, verdicts and card, in one commit.

    Other files of the folder stay where they are, and so does what the repository holds beside them.

    Args:
        folder: a checkpoint that quantkit exported.
        repository: ``org/name`` on the hub; made if it is not there.
        private: whether a repository that is made is private; an existing one stays as it is.
        revision: a branch, made if it is not there; None is the main one.
        token: of the hub; None is the one of ``HF_TOKEN`` or of a login.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the folder is no export of quantkit, or not whole, or its manifest names files outside it.
        OutputError: there is no token, or the hub cannot be reached or refuses.
    """
    files = files_to_push(folder)
    held = token or get_token()
    if held is None:
        raise OutputError(f"pushing to {repository} needs a token of the hub, and there is none", TOKEN_WANTED)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=held, library_name="quantkit")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()],
            commit_message=message or "Upload a checkpoint quantized by quantkit",
            revision=revision,
        )
    except (HFValidationError, OSError, ValueError, RuntimeError, TRANSPORT_ERROR) as error:
        raise _translated(repository, error) from error
    return str(done.commit_url)


def files_to_push(folder: Path) -> dict[str, Path]:
    """The files of an export by their names in a repository.

    Raises:
        CheckpointError: there is no manifest, a file is missing or of another size, or lies outside the folder.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"{folder} has no manifest of quantkit", "give the folder of an exported checkpoint")
    listed = manifest.get("files")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / MANIFEST} lists no files", "export the checkpoint again")
    beside = [name for name in (SIGNATURE, *DESCRIBING) if (folder / name).is_file() and name not in listed]
    names = [*listed, MANIFEST, *beside]
    root = folder.resolve()
    for name in names:
        pure = PurePosixPath(name)
        plain = not pure.is_absolute() and ".." not in pure.parts and "\\" not in name and "\0" not in name
        if not plain or not (folder / name).resolve().is_relative_to(root):
            raise CheckpointError(
                f"{folder / MANIFEST} names {name!r}, which lies outside the checkpoint", "export the checkpoint again"
            )
    if not is_whole(folder):
        broken = next(name for name in listed if not _is_there(folder / name, listed[name]))
        raise CheckpointError(
            f"{folder} is not whole: {broken} is missing or of another size than {MANIFEST} says",
            "export the checkpoint again",
        )
    return {name: folder / name for name in names}


def _is_there(file: Path, facts: object) -> bool:
    size = facts.get("bytes") if isinstance(facts, dict) else None
    return is_file(file) and file.stat().st_size == size


def _refusal(error: BaseException) -> BaseException:
    """What the hub answered, where huggingface_hub has wrapped that into an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return cause
        cause = cause.__cause__
    return error


def _translated(repository: str, error: BaseException) -> QuantkitError:
    """One line with the remedy; the foreign message stays behind, since it can be long and hold request headers."""
    if isinstance(error, HFValidationError):
        return OutputError(f"'{repository}' is not the name of a repository", "write org/name")
    error = _refusal(error)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return OutputError("the hub does not accept the token", TOKEN_WANTED)
    if status == 403:
        return OutputError(
            f"the token may not write to {repository}",
            "use a token with write permission for that user or organization",
        )
    if isinstance(error, RevisionNotFoundError | RepositoryNotFoundError) or status == 404:
        return OutputError(f"the hub has no {repository} that this token may write to", "check the name and the token")
    if status is not None:
        return OutputError(f"the hub refused the upload to {repository}: status {status}", "run the same command again")
    if isinstance(error, OfflineModeIsEnabled):
        return OutputError("the hub is switched off here by HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE")
    if isinstance(error, OSError | TRANSPORT_ERROR):
        return OutputError(
            f"the hub cannot be reached to push {repository}: {type(error).__name__}",
            "check the network, and run again",
        )
    return OutputError(f"uploading to {repository} failed: {type(error).__name__}", "run the same command again")
