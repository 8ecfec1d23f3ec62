"""What the source stage gives to the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

DECODER = 1
"""Raised when quantized checkpoints would be decoded to other values than before."""
GGUF_CONVERTER = 2
"""Raised when the conversion of GGUF files would write other values or tokens than before."""

DEQUANTIZED = "the dequantized source"
"""What the variants of a model that lay quantized are compared with."""
DECODED_FROM = "decoded_from"
"""The key of a ``config.json`` that says what its weights were decoded from."""


def decoded_from(source_facts: Mapping[str, Any]) -> str | None:
    """What a float model was decoded from, such as ``gptq (int)``; None where it lay as floats."""
    told = source_facts.get("decoded") or ("GGUF" if source_facts.get("relative_to") == DEQUANTIZED else None)
    return None if told is None else str(told)


@dataclass(frozen=True)
class SourceModel:
    """A float checkpoint on disk, and where it came from.

    Attributes:
        folder: holds ``config.json``, a tokenizer and float safetensors.
        reference: what the recipe calls the model.
        kind: what the reference turned out to be.
        relative_to: what the quantized variants are compared with, for the report.
        dtype: of the weights in ``folder``: ``float32``, ``float16`` or ``bfloat16``.
        sha256: file name to hash, of all files of the source that make up the model.
        revision: commit of a hub model.
        decoded: what the weights were stored in, of a checkpoint that was decoded, such as ``fp8``; else None.
        note: what the user should know of its dtype, in a sentence; empty where it is the model's own.
        notes: what the folder or its config says and its weights do not, a line each.
        mended: what was changed therefore, beside the dtype.
        unchecked: files of a hub model whose hash could not be learnt from the hub or its cache.
    """

    folder: Path
    reference: str
    kind: Literal["folder", "hub", "gguf"]
    relative_to: str
    dtype: str
    sha256: dict[str, str]
    revision: str | None = None
    unchecked: tuple[str, ...] = ()
    decoded: str | None = None
    note: str = ""
    notes: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()

    def made_from(self) -> dict[str, Any]:
        """What the model's values and tokens depend on, for fingerprints; not where the model lies."""
        content: dict[str, Any] = {"dtype": self.dtype, "sha256": dict(sorted(self.sha256.items()))}
        if self.decoded is not None:
            content |= {"decoder": DECODER, "decoded": self.decoded}
        if self.mended:
            content["mended"] = sorted(self.mended)
        return content | ({"gguf_converter": GGUF_CONVERTER} if self.kind == "gguf" else {})
