"""Adapters for a quantized checkpoint: PEFT's two files, which say of which checkpoint they make up the loss.

An adapter that takes up what quantization lost is worth something on the codes that it was made for, and harm anywhere
else. So the header of its tensors has a digest of these (:func:`base_digest`), which stays with them wherever they are
copied, and its manifest has it again with what was measured.

A checkpoint with such an adapter in its folder ``adapter`` is one that is computed with it, by the runtimes that can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from quantkit.checkpoint import SINGLE_FILE, CheckpointReader, ShardWriter
from quantkit.checkpoint.adapter_folder import BASE, CONFIG, PREFIX, WEIGHTS, made_for
from quantkit.checkpoint.header import read_header
from quantkit.errors import CheckpointError
from quantkit.exports import open_export
from quantkit.exports.manifest import MANIFEST, is_whole, write_manifest
from quantkit.gguf.parts import parts_of
from quantkit.numerics.low_rank import LowRank
from quantkit.system.artifacts import file_sha256, fingerprint, mapping_or_nothing, read_json, write_json

FOLDER = "adapter"
"""The folder of a checkpoint that holds the adapter with which it is computed."""
TENSORS = (".safetensors", ".gguf")
AGAIN = "make the adapter again with 'quantkit recover'"
MERGE = "quantkit merge BASE ADAPTER OUT"


class AdapterReader(CheckpointReader):
    """The tensors of one ``adapter_model.safetensors``."""

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        self.index = None
        self._entries = read_header(file)


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What PEFT is told of an adapter.

    Attributes:
        rank: of every layer.
        alpha: the products are multiplied with ``alpha / rank``.
        base: what the quantized checkpoint is called, without a path of this machine.
        targets: names that tell the adapted modules from all others of the model, or all of them in full.
        transposed: the modules hold their weights transposed, as GPT-2's do.
        dtype: of the tensors.
    """

    rank: int
    alpha: float
    base: str
    targets: tuple[str, ...]
    transposed: bool
    dtype: torch.dtype

    def to_json(self) -> dict[str, Any]:
        """``adapter_config.json``, with the keys that every version of PEFT knows."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": 0.0,
            "target_modules": list(self.targets),
            "bias": "none",
            "modules_to_save": None,
            "fan_in_fan_out": self.transposed,
            "inference_mode": True,
            "init_lora_weights": True,
        }


def write_adapter(
    folder: Path,
    terms: Mapping[str, LowRank],
    settings: AdapterSettings,
    digest: str,
    facts: Mapping[str, Any],
) -> None:
    """Write an adapter as PEFT saves one, with its manifest.

    Args:
        folder: an empty one.
        terms: by the paths of modules in the model of transformers.
        settings: what PEFT is told.
        digest: of the base, see :func:`base_digest`.
        facts: what the manifest says beside the base and the files; ``names`` has the checkpoint's name of each layer.

    Raises:
        OutputError: the folder cannot be written.
    """
    share = (settings.rank / settings.alpha) ** 0.5
    with ShardWriter(folder, max_shard_bytes=1 << 62, said={BASE: digest}) as writer:
        tensors = {
            f"{PREFIX}{path}.{part}.weight": (matrix * share).to(settings.dtype)
            for path, term in terms.items()
            for part, matrix in (("lora_A", term.down), ("lora_B", term.up))
        }
        for name, tensor in tensors.items():
            writer.declare(name, tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    (folder / SINGLE_FILE).rename(folder / WEIGHTS)
    write_json(folder / CONFIG, settings.to_json())
    write_manifest(folder, {"schema": 1, "kind": "adapter", "base": {"name": settings.base, "digest": digest}, **facts})


def base_digest(checkpoint: Path) -> str:
    """A digest of the tensors of a quantized checkpoint, whatever lies beside them.

    Raises:
        CheckpointError: it is no quantized checkpoint that quantkit reads.
    """
    listed = mapping_or_nothing(checkpoint / MANIFEST).get("files", {}) if checkpoint.is_dir() else {}
    known = listed if checkpoint.is_dir() and is_whole(checkpoint) else {}
    files = [file for file in open_export(checkpoint).files() if file.name.endswith(TENSORS)]
    return digest_of(
        {each.name: known[each.name]["sha256"] if each.name in known else file_sha256(each) for each in files}
    )


def digest_of(sha256: Mapping[str, str]) -> str:
    """The same of the SHA-256 of a checkpoint's files, by their names."""
    return fingerprint(sorted(each for name, each in sha256.items() if name.endswith(TENSORS)))


def adapter_beside(checkpoint: Path) -> Path | None:
    """The adapter with which a checkpoint is computed; None where it has none of quantkit's.

    Raises:
        CheckpointError: it belongs to another checkpoint, or is broken.
    """
    folder = checkpoint / FOLDER
    if not checkpoint.is_dir() or not (folder / CONFIG).is_file() or made_for(folder) is None:
        return None
    check_made_for(folder, checkpoint)
    return folder


def check_made_for(adapter: Path, checkpoint: Path) -> None:
    """Refuse an adapter on another base than its own.

    Raises:
        CheckpointError: quantkit made it for another checkpoint.
    """
    wanted = made_for(adapter)
    if wanted is not None and wanted != base_digest(checkpoint):
        named = read_json(adapter / CONFIG).get("base_model_name_or_path")
        raise CheckpointError(
            f"adapter {adapter} takes up what quantization lost in '{named}', and {checkpoint} holds other codes",
            f"give the checkpoint that it was made for, or {AGAIN}",
        )


def read_terms(adapter: Path) -> dict[str, LowRank]:
    """The terms of an adapter that quantkit made, by the names that the layers have in the checkpoint.

    Raises:
        CheckpointError: a file is broken, or they do not fit each other.
    """
    reader = AdapterReader(adapter / WEIGHTS)
    try:
        config, names = read_json(adapter / CONFIG), read_json(adapter / MANIFEST)["names"]
        scaling = float(config["lora_alpha"]) / int(config["r"])
        found = {}
        for path, name in names.items():
            down, up = (reader.read_finite(f"{PREFIX}{path}.{part}.weight").float() for part in ("lora_A", "lora_B"))
            found[str(name)] = LowRank(down, up * scaling)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"adapter {adapter} cannot be read: {type(error).__name__}: {error}", AGAIN) from error
    return found


@contextmanager
def with_adapter(checkpoint: Path, adapter: Path) -> Iterator[Path]:
    """A folder of links in which an adapter lies with its checkpoint, so that runtimes compute with it, for a time.

    Args:
        checkpoint: folder or GGUF file.
        adapter: folder that :func:`write_adapter` wrote.

    Raises:
        CheckpointError: quantkit did not make the adapter, or made it for another checkpoint.
    """
    if made_for(adapter) is None:
        raise CheckpointError(
            f"{adapter} is no adapter that 'quantkit recover' made for a quantized checkpoint",
            f"merge a LoRA of yours into its float base: {MERGE}",
        )
    check_made_for(adapter, checkpoint)
    with TemporaryDirectory(prefix="quantkit-adapted-") as scratch:
        folder = Path(scratch) / checkpoint.name
        folder.mkdir()
        files = parts_of(checkpoint) if checkpoint.is_file() else checkpoint.iterdir()
        for file in files:
            if file.name != FOLDER:
                (folder / file.name).symlink_to(file.absolute())
        (folder / FOLDER).symlink_to(adapter.absolute(), target_is_directory=True)
        yield folder
