"""Signatures of checkpoints: write one, and check one with every file that its manifest lists, byte by byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from quantkit.errors import CheckpointError
from quantkit.exports.manifest import MANIFEST, NOT_LISTED, SIGNATURE
from quantkit.publishing.signature_keys import public_key, require_minisign, secret_key, small_file
from quantkit.system.artifacts import STAGE_FILE, file_sha256, read_json, write_text
from quantkit.system.os_errors import is_file

GET_AGAIN = "get the checkpoint again from its source"
ALLOWED = {*NOT_LISTED, STAGE_FILE}


@dataclass(frozen=True, slots=True)
class Verified:
    """A checkpoint whose signature and files are right.

    Attributes:
        files: how many were compared.
        comment: what the signer said, which is signed too.
    """

    files: int
    comment: str


def sign(checkpoint: str | Path, key: str | Path, *, password: str | None = None) -> Path:
    """Write ``manifest.json.minisig`` beside the manifest of a checkpoint, after its files were compared with it.

    Args:
        checkpoint: folder of a checkpoint that quantkit exported.
        key: file of a secret key of minisign.
        password: of the key, where it has one.

    Returns:
        The signature's file.

    Raises:
        CheckpointError: there is no manifest, or a file is not what it says.
        QuantkitError: the key cannot be used.
        OutputError: the signature cannot be written.
        MissingDependencyError: ``py-minisign`` is not installed.
    """
    require_minisign()
    folder = Path(checkpoint)
    signer = secret_key(Path(key), password)
    check_files(folder)
    content = (folder / MANIFEST).read_bytes()
    comment = f"file:{MANIFEST} sha256:{file_sha256(folder / MANIFEST)}"
    signature = signer.sign(content, trusted_comment=comment, untrusted_comment="signature of a quantkit manifest")
    write_text(folder / SIGNATURE, bytes(signature).decode() + "\n")
    return folder / SIGNATURE


def verify_signature(checkpoint: str | Path, key: str) -> Verified:
    """Check that a checkpoint is signed by a key, and that every file is the one that was signed.

    Args:
        checkpoint: its folder.
        key: file of a public key of minisign, or the key itself.

    Raises:
        CheckpointError: it is not signed, signed by another key, or a file differs, is missing or is one too many.
        QuantkitError: the key is none.
        MissingDependencyError: ``py-minisign`` is not installed.
    """
    require_minisign()
    from minisign import Error, Signature, VerifyError

    folder = Path(checkpoint)
    signer = public_key(key)
    if not (folder / SIGNATURE).is_file():
        raise CheckpointError(f"{folder} is not signed: it has no {SIGNATURE}", "sign it with 'quantkit sign'")
    text = small_file(folder / SIGNATURE, "signature", GET_AGAIN)
    try:
        signature = Signature.from_bytes(text)
    except (Error, ValueError) as error:
        raise CheckpointError(f"{folder / SIGNATURE} is no signature of minisign: {error}", GET_AGAIN) from error
    try:
        content = (folder / MANIFEST).read_bytes()
        signer.verify(content, signature)
    except OSError as error:
        raise CheckpointError(f"cannot read {folder / MANIFEST}: {error.strerror}", GET_AGAIN) from error
    except (VerifyError, Error, ValueError) as error:
        raise CheckpointError(
            f"the signature of {folder} is not by this key, or {MANIFEST} was changed since",
            "check the key; if it is the right one, do not use the checkpoint",
        ) from error
    return Verified(check_files(folder), signature.trusted_comment)


def check_files(folder: Path) -> int:
    """Check every file against the manifest: its size, its SHA-256, and that there is no other file.

    Returns:
        How many there are.

    Raises:
        CheckpointError: there is no manifest, or the first difference.
    """
    listed = _listed(folder)
    for name, facts in listed.items():
        _check_file(folder, name, facts)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    unlisted = sorted(name for name in there - listed.keys() - ALLOWED if PurePosixPath(name).name[0] != ".")
    if unlisted:
        raise CheckpointError(
            f"{folder} holds {unlisted[0]}, which its manifest does not list", "remove it, or export again"
        )
    return len(listed)


def _listed(folder: Path) -> dict[str, Any]:
    try:
        listed = read_json(folder / MANIFEST)["files"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{folder} has no manifest that lists its files", "give the folder of a checkpoint that quantkit exported"
        ) from error
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{folder / MANIFEST} lists no files", GET_AGAIN)
    return listed


def _check_file(folder: Path, name: str, facts: Any) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder / MANIFEST} names {name!r}, which lies outside the checkpoint", GET_AGAIN)
    path = folder / name
    if not is_file(path):
        raise CheckpointError(f"{name} of {folder} is missing", GET_AGAIN)
    if not isinstance(facts, dict) or path.stat().st_size != facts.get("bytes"):
        raise CheckpointError(f"{name} of {folder} is not of the size that the manifest says", GET_AGAIN)
    if file_sha256(path) != facts.get("sha256"):
        raise CheckpointError(
            f"{name} of {folder} is not the file that the manifest describes: its hash differs", GET_AGAIN
        )
