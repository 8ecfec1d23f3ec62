"""A folder of a LoRA training where a model is wanted: what it is, and what to do with it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from quantkit.checkpoint.header import read_said
from quantkit.system.artifacts import mapping_or_nothing

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT's names of an adapter's tensors begin with."""
BASE = "quantkit.base"
"""What the header of an adapter's tensors calls the digest of the quantized checkpoint that it was made for."""


class Found(NamedTuple):
    """What a folder is, and the way out."""

    problem: str
    remedy: str


def adapter_in(folder: Path) -> Found | None:
    """That a folder holds adapters and no model; None where it holds a model, or neither."""
    if not folder.is_dir() or _holds_model(folder):
        return None
    if (folder / CONFIG).is_file():
        return Found(f"{folder} holds a LoRA adapter and no model", _way_out(folder))
    within = latest_within(folder)
    if within is None:
        return None
    return Found(f"{folder} holds the checkpoints of a LoRA training and no model", _way_out(within))


def made_for(folder: Path) -> str | None:
    """The digest of the codes whose loss an adapter takes up, see :mod:`quantkit.exports.adapter`; None for others.

    Raises:
        CheckpointError: its tensors are broken.
    """
    file = folder / WEIGHTS
    return read_said(file).get(BASE) if file.is_file() else None


def latest_within(folder: Path) -> Path | None:
    """The last of the folders in a folder that hold adapters, as the checkpoints of a training do."""
    found = [file.parent for file in folder.glob(f"*/{CONFIG}")]
    return max(found, key=lambda each: (len(each.name), each.name), default=None)


def _holds_model(folder: Path) -> bool:
    """Whether there is a model's config or GGUF file, and beside an adapter's config weights that are not its own."""
    if not (folder / CONFIG).is_file():
        return (folder / "config.json").exists() or any(folder.glob("*.gguf"))
    if not (folder / "config.json").exists():
        return False
    weights = (file.name for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    return any(not name.startswith(("adapter_", "training_args")) for name in weights)


def _way_out(adapter: Path) -> str:
    base = _base(adapter) or "BASE"
    if made_for(adapter) is not None:
        return f"give the quantized checkpoint that it was made for, {base}, with this as its adapter (--adapter)"
    return (
        f"merge it into its base first: quantkit merge {base} {adapter} OUT; "
        f"or quantize {base} with it: model.adapter: {adapter} (--adapter)"
    )


def _base(adapter: Path) -> str:
    named = mapping_or_nothing(adapter / CONFIG).get("base_model_name_or_path")
    return named if isinstance(named, str) else ""
