"""A calibration set, and its folder on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialized

from quantkit.errors import CalibrationError
from quantkit.system.artifacts import read_json, write_json

TOKENS_FILE = "tokens.safetensors"
AUDIT_FILE = "audit.json"


@dataclass(frozen=True)
class CalibrationSet:
    """The token rows that every method of a recipe is calibrated on.

    Attributes:
        rows: token ids, each row at most ``max_length`` long.
        audit: what became of every record and token; see :func:`quantkit.calibration.audit.make_audit`.
        sha256: see :func:`token_ids_sha256`.
        tokens: in all rows together.
    """

    rows: list[list[int]]
    audit: dict[str, Any]
    sha256: str
    tokens: int


def token_ids_sha256(rows: Iterable[Iterable[int]]) -> str:
    """SHA-256 over the rows in their order, each as its length and then its ids, all as little-endian int32."""
    digest = hashlib.sha256()
    for row in rows:
        ids = np.fromiter(row, dtype="<i4")
        digest.update(np.array([ids.size], dtype="<i4").tobytes() + ids.tobytes())
    return digest.hexdigest()


def save(folder: Path, built: CalibrationSet) -> None:
    """Write ``tokens.safetensors`` (int32 ``ids`` of all rows, int64 ``lengths``) and ``audit.json``."""
    ids = np.concatenate([np.array(row, dtype=np.int32) for row in built.rows])
    lengths = np.array([len(row) for row in built.rows], dtype=np.int64)
    (folder / TOKENS_FILE).write_bytes(serialized({"ids": ids, "lengths": lengths}))
    write_json(folder / AUDIT_FILE, built.audit)


def load(folder: Path) -> CalibrationSet:
    """Read the folder of a calibration stage.

    Raises:
        CalibrationError: a file is missing or broken, or the tokens are not those of the audit.
    """
    remedy = "remove the folder and build the calibration set again"
    try:
        tensors = load_file(folder / TOKENS_FILE)
        audit: dict[str, Any] = read_json(folder / AUDIT_FILE)
        rows = _rows(tensors["ids"], tensors["lengths"])
        wanted = audit["token_ids_sha256"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CalibrationError(f"{folder} is not a whole calibration set: {error}", remedy) from error
    sha256 = token_ids_sha256(rows)
    if sha256 != wanted:
        raise CalibrationError(f"the tokens in {folder} are not those of its audit", remedy)
    return CalibrationSet(rows, audit, sha256, sum(map(len, rows)))


def _rows(ids: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> list[list[int]]:
    if ids.ndim != 1 or lengths.ndim != 1 or (lengths < 1).any() or lengths.sum() != ids.size:
        raise ValueError("the rows' lengths do not add up to the tokens")
    ends = np.cumsum(lengths)
    return [ids[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]
