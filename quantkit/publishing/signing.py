"""Sign an exported checkpoint."""

from __future__ import annotations

from pathlib import Path

from quantkit.exports.manifest import MANIFEST, SIGNATURE
from quantkit.publishing.signature_files import check_files
from quantkit.publishing.signature_keys import require_minisign, secret_key
from quantkit.system.artifacts import file_sha256, write_text


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
