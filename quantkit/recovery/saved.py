"""The state of a training on disk, from which a run that was killed goes on with the same bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quantkit.system.artifacts import read_json, translated_os_errors, write_json

STATE = "training.json"
"""Says which files count; written behind them."""


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors so that the file is whole under its name.

    Raises:
        OutputError: the disk is full.
    """
    part = file.with_suffix(".part")
    with translated_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: each.detach().cpu().contiguous() for name, each in tensors.items()}, part)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.rename(file)


def save_state(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], told: Mapping[str, Any]) -> None:
    """Keep the state behind a step, and let go of the one before.

    Args:
        folder: of the training.
        step: how many are done.
        tensors: of the state.
        told: the rest of it, as JSON; ``best`` in it names a file that stays.

    Raises:
        OutputError: the disk is full.
    """
    file = folder / f"state-{step}.safetensors"
    write_tensors(file, tensors)
    write_json(folder / STATE, {**told, "step": step})
    for old in folder.glob("*.safetensors"):
        if old.name.startswith(("state-", "best-")) and old.name not in (file.name, told.get("best")):
            old.unlink()


def read_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """What :func:`save_state` kept last: the tensors and the rest; None where there is nothing whole."""
    try:
        told = read_json(folder / STATE)
        return load_file(folder / f"state-{told['step']}.safetensors"), told
    except (OSError, ValueError, KeyError, TypeError):
        return None
