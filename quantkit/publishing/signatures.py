"""Check the signature of a checkpoint, and with it every file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import CheckpointError
from quantkit.exports.manifest import MANIFEST, SIGNATURE
from quantkit.publishing.signature_files import GET_AGAIN, check_files
from quantkit.publishing.signature_keys import public_key, require_minisign, small_file


@dataclass(frozen=True, slots=True)
class Verified:
    """A checkpoint whose signature and files are right.

    Attributes:
        files: how many were compared.
        comment: what the signer said, which is signed too.
    """

    files: int
    comment: str


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
