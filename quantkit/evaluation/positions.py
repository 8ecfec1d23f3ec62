"""The figures of every scored position on disk, from which a later round of a stage goes on; see ``rounds``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quantkit.errors import EvaluationError
from quantkit.evaluation.job import POSITIONS
from quantkit.evaluation.scoring import TextScore
from quantkit.evaluation.texts import Windows
from quantkit.system.artifacts import translated_os_errors


def write_positions(folder: Path, windows: Mapping[str, Windows], scores: Mapping[str, TextScore]) -> None:
    """Write token ids and figures of each text.

    Args:
        folder: of the stage.
        windows: the texts.
        scores: of each.

    Raises:
        OutputError: the file cannot be written.
    """
    ids = {f"{name}.ids": text.ids.contiguous() for name, text in windows.items()}
    figures = {f"{name}.figures": text.positions for name, text in scores.items() if text.positions is not None}
    path = folder / POSITIONS
    with translated_os_errors(path):
        save_file({**ids, **figures}, path)


def read_positions(folder: Path | None, windows: Mapping[str, Windows]) -> dict[str, torch.Tensor]:
    """The figures of the first windows of each text, float64 ``[figures, windows, positions]``; none without a folder.

    Raises:
        EvaluationError: the file is damaged, or the texts do not begin with what was scored.
    """
    if folder is None:
        return {}
    try:
        stored = load_file(folder / POSITIONS)
    except (OSError, SafetensorError) as error:
        raise EvaluationError(f"{folder / POSITIONS} cannot be read: {error}", f"remove {folder}") from error
    for name, text in windows.items():
        ids = stored[f"{name}.ids"]
        if not torch.equal(ids, text.ids[: len(ids)]):
            raise EvaluationError(f"text '{name}' does not begin with what was scored before", f"remove {folder}")
    return {name: stored[f"{name}.figures"] for name in windows}
