"""The estimate that stands beside a measurement in a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkit.errors import SourceError
from quantkit.estimation.anatomy import Anatomy
from quantkit.estimation.configs import Config
from quantkit.estimation.families import describe
from quantkit.estimation.inference import weights_line
from quantkit.estimation.weights import stored
from quantkit.formats.base import BYTES
from quantkit.recipe import VariantSpec

ESTIMATED = "weights_estimated_bytes"


def beside_measured(
    figures: dict[str, Any], result: dict[str, Any], folder: Path, variant: VariantSpec
) -> dict[str, Any]:
    """Figures of a variant with the estimate of its weights among those of memory.

    Args:
        figures: as the report has them.
        result: of the evaluation, which tells what loaded the checkpoint and in which dtype.
        folder: of the checkpoint.
        variant: what was done to the model.
    """
    if not figures.get("memory"):
        return figures
    dtype = str(result["environment"].get("dtype"))
    decoded = dtype if result.get("loaded_by") == "reference" and dtype in BYTES else None
    return {**figures, "memory": {**figures["memory"], ESTIMATED: estimated_weights(folder, variant, decoded)}}


def estimated_weights(folder: Path, variant: VariantSpec, decoded: str | None = None) -> int | None:
    """Bytes of a variant's weights in memory; None for a model of a family that is not described.

    Args:
        folder: of the checkpoint, of which only the config is read.
        variant: what was done to the model.
        decoded: the dtype to which the reference decodes it; None where it stays packed.
    """
    try:
        anatomy = _anatomy(folder)
    except SourceError:
        return None
    return None if anatomy is None else weights_line(anatomy, stored(anatomy, variant), decoded).nbytes


def _anatomy(folder: Path) -> Anatomy | None:
    file = folder / "config.json"
    if file.is_file():
        data = json.loads(file.read_text(encoding="utf-8"))
    else:
        from quantkit.exports import open_export

        data = open_export(folder).config()
    return describe(Config(data, folder.name))
