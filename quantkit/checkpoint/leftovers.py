"""Leftovers: what lies in a model's folder and is no part of the model, and what loaders would make of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.companions import VOICES
from quantkit.checkpoint.header import INDEX_FILE, SINGLE_FILE
from quantkit.checkpoint.reader import PICKLES, CheckpointReader
from quantkit.system.artifacts import mapping_or_nothing

ADAPTER = "adapter_config.json"
SHOWN = 4
QUANTIZED = ("quantization_config", "compression_config")
"""Keys of a config that say that its weights are quantized."""
SCALES = ("scale", "scales", "scale_inv", ".absmax", ".qzeros")
AS_THEY_COMPUTE = frozenset({"bitnet"})
"""Ways of quantizing that keep float weights and round them whenever they compute."""


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a ``config.json`` says of quantization, of the whole or of one of its models; None if it says nothing."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = next((part[key] for key in QUANTIZED if part.get(key)), None)
        if found:
            return found if isinstance(found, dict) else {}
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the float model."""
    plain = {key: value for key, value in config.items() if key not in QUANTIZED}
    return {
        key: {inner: each for inner, each in value.items() if inner not in QUANTIZED}
        if isinstance(value, dict)
        else value
        for key, value in plain.items()
    }


def is_stale(said: Mapping[str, Any] | None, reader: CheckpointReader) -> bool:
    """Whether a config speaks of quantization and its weights are floats, as merges leave it that keep their base's.

    Args:
        said: what the config says, see :func:`quantization_of`.
        reader: the weights.
    """
    return said is not None and str(said.get("quant_method")) not in AS_THEY_COMPUTE and are_floats(reader)


def are_floats(reader: CheckpointReader) -> bool:
    """Whether all matrices are floats of 16 bits and more, and none has scales beside it."""
    matrices = [name for name in reader.names() if len(reader.shape(name)) > 1]
    wide = all(reader.dtype(name).is_floating_point and reader.dtype(name).itemsize > 1 for name in matrices)
    return wide and not any(name.endswith(SCALES) for name in reader.names())


def is_quantized(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder is a quantized checkpoint: its config says so, and its weights do.

    Raises:
        CheckpointError: the weights are missing or broken.
    """
    said = quantization_of(config)
    return said is not None and not is_stale(said, CheckpointReader(folder))


def leftovers(folder: Path, config: Mapping[str, Any], reader: CheckpointReader) -> list[str]:
    """What a folder holds beside its model that somebody might take for a part of it, a line each."""
    found = []
    said = quantization_of(config)
    if is_stale(said, reader):
        method = str((said or {}).get("quant_method") or "its own way")
        found.append(
            f"config.json says that the weights are quantized ({method}), and they are floats: so they are taken"
        )
    if (folder / ADAPTER).is_file():
        named = mapping_or_nothing(folder / ADAPTER).get("base_model_name_or_path")
        of = f" (for {named})" if isinstance(named, str) and named else ""
        found.append(
            f"{ADAPTER}{of} lies beside a whole model: the model is taken as it is, without the adapter, which "
            "'quantkit merge' adds if the weights do not have it yet; exports leave it out"
        )
    if (folder / SINGLE_FILE).exists() and (folder / INDEX_FILE).exists():
        stale, read = (SINGLE_FILE, INDEX_FILE) if reader.index else (INDEX_FILE, SINGLE_FILE)
        found.append(f"{stale} is a leftover beside {read}, which is read")
    own = {file.name for file in reader.files()}
    others = [file.name for file in sorted(folder.glob("*.safetensors")) if file.name not in own]
    pickles = sorted({file.name for pattern in PICKLES for file in folder.glob(pattern)} - set(VOICES))
    if others or pickles:
        names = [*others, *pickles]
        rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        found.append(f"not read, as {reader.files()[0].name} is: {', '.join(names[:SHOWN])}{rest}")
    return found


def misleads_loaders(folder: Path, reader: CheckpointReader) -> bool:
    """Whether loaders would read something else than the model, an adapter or one of two checkpoints, or ask which."""
    two = (folder / SINGLE_FILE).exists() and (folder / INDEX_FILE).exists()
    return two or (folder / ADAPTER).is_file()
