"""``manifest.json``: what an exported checkpoint is, who made it of what, and the hash of every file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import CheckpointError
from quantkit.system.artifacts import file_sha256, fingerprint, read_json, write_json

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.minisig"
CALIBRATION = "calibration.json"
"""The audit of the calibration set, for a checkpoint that was calibrated."""
VERDICTS = "verified.json"
"""Verdicts of runtimes by their names, in a file of their own, which a signature of the manifest does not cover."""
VERIFIED = "verified"
"""The key under which earlier versions kept verdicts in the manifest; it is no part of the checkpoint's identity."""
FOREIGN = "foreign"
"""The key that says that another tool wrote the tensors, so that they are read as any file of its kind."""
DESCRIBING = ("README.md", VERDICTS)
"""Files that speak of the checkpoint and may be written again when more is known of it."""
NOT_LISTED = (MANIFEST, SIGNATURE, *DESCRIBING)
EXPORT_AGAIN = "export the checkpoint again"


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest: the facts, and the SHA-256 and size of every file of the folder but ``NOT_LISTED``."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in NOT_LISTED
    }
    write_json(folder / MANIFEST, {**facts, "files": files})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint that quantkit exported; None where there is none that tells the layers.

    Raises:
        CheckpointError: it is broken.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", EXPORT_AGAIN) from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), str):
        return None
    layers = content.get("layers")
    if not isinstance(layers, dict):
        return None
    if not all(isinstance(scheme, dict) for scheme in layers.values()):
        raise CheckpointError(f"{file}: 'layers' does not map layers to schemes", EXPORT_AGAIN)
    return content


def read_verdicts(folder: Path) -> dict[str, dict[str, Any]]:
    """What runtimes were found to make of a checkpoint that quantkit exported, by their names.

    Raises:
        CheckpointError: the file is broken, or the manifest is.
    """
    kept = (read_manifest(folder) or {}).get(VERIFIED) or {}
    file = folder / VERDICTS
    try:
        later = read_json(file) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}", "remove it, and run 'quantkit verify' again"
        ) from error
    for place, content in ((folder / MANIFEST, kept), (file, later)):
        if not isinstance(content, dict) or not all(isinstance(verdict, dict) for verdict in content.values()):
            raise CheckpointError(
                f"{place} does not map runtimes to verdicts", "run 'quantkit verify' again without it"
            )
    return {**kept, **later}


def keep_verdict(folder: Path, runtime: str, verdict: Mapping[str, Any]) -> None:
    """Put a runtime's verdict beside those of others, in the place of its earlier one.

    Raises:
        CheckpointError: the file of verdicts is broken.
        OutputError: it cannot be written.
    """
    write_json(folder / VERDICTS, {**read_verdicts(folder), runtime: dict(verdict)})


def identity(folder: Path) -> str:
    """A fingerprint of an exported checkpoint, which verdicts of runtimes do not change."""
    content = read_json(folder / MANIFEST)
    return fingerprint({key: value for key, value in content.items() if key != VERIFIED})


def is_whole(folder: Path) -> bool:
    """Whether every file of the manifest is there with its size; contents are not hashed."""
    try:
        files = read_json(folder / MANIFEST)["files"]
        return all((folder / name).stat().st_size == facts["bytes"] for name, facts in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def model_name(reference: Any) -> str:
    """What a model is called by its reference: the last part of a path or hub id; empty where there is none."""
    if not isinstance(reference, str) or not reference:
        return ""
    path = Path(reference).expanduser()
    place = path.resolve() if path.exists() else path
    if place.parent.name == "snapshots":
        return place.parent.parent.name.rpartition("--")[2]
    return place.name.partition("@")[0].removesuffix(".gguf")


def public_reference(reference: Any) -> Any:
    """A model's reference for others: of one on this machine its name alone."""
    return Path(reference).name if isinstance(reference, str) and Path(reference).expanduser().exists() else reference
