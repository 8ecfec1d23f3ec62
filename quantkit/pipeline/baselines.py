"""The row of the float model merged into the other base."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from quantkit.estimation.measured import beside_measured
from quantkit.evaluation.stage import report_figures
from quantkit.merging import other_merge
from quantkit.pipeline.context import Run, attempted, score_beside
from quantkit.schemes.base import PER_CHANNEL


def other_merge_rows(current: Run, baseline: dict[str, Any]) -> list[dict[str, Any]]:
    """The row of the float model merged into the other base, where the recipe asks for one to compare with."""
    merge = current.recipe.merge
    if merge.compare is None:
        return []
    row: dict[str, Any] = {
        "name": f"merged-{merge.compare}",
        "status": "ok",
        "error": None,
        "method": "none",
        "format": "float",
        "group_size": PER_CHANNEL,
        "symmetric": True,
        "options": {},
    }
    return [attempted(current, row, partial(_other_merge, current, row["name"], baseline))]


def _other_merge(current: Run, name: str, baseline: dict[str, Any]) -> dict[str, Any]:
    recipe = current.recipe
    model = other_merge(recipe.model, recipe.merge, current.folder, current.observer)
    scored = score_beside(current, name, model.folder, model.made_from(), baseline)
    bits = 8 * getattr(torch, model.dtype).itemsize
    return {
        "scheme": model.dtype,
        "bits": bits,
        "checkpoint": str(model.folder),
        "bits_per_weight": float(bits),
        "layers": [],
        "notes": list(model.merge["notes"]),
        **beside_measured(report_figures(scored), scored, model.folder),
        "seconds": {"quantize": 0.0, "evaluate": scored["seconds"]},
    }
