"""quantkit: post-training quantization, export and comparison of large language models.

One recipe names a model, a calibration set and variants; :func:`run` quantizes the model in every one of
them, scores each exported file against the float model and writes a report to choose by.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.api.checkpoints import convert, inspect, push, verify
    from quantkit.api.estimating import estimate
    from quantkit.api.making import merge, quantize, recover
    from quantkit.api.recipes import import_recipe, plan, run, run_all
    from quantkit.api.scoring import evaluate
    from quantkit.pipeline.fitting import fit
    from quantkit.recipe import Recipe
    from quantkit.regression.api import accept, check, history

    __version__: str

__all__ = [
    "QuantkitError",
    "Recipe",
    "accept",
    "check",
    "convert",
    "estimate",
    "evaluate",
    "fit",
    "history",
    "import_recipe",
    "inspect",
    "merge",
    "plan",
    "push",
    "quantize",
    "recover",
    "run",
    "run_all",
    "verify",
]

logging.getLogger("quantkit").addHandler(logging.NullHandler())

_HOMES = {
    name: home
    for home, names in {
        "quantkit.api.checkpoints": ("convert", "inspect", "push", "verify"),
        "quantkit.api.estimating": ("estimate",),
        "quantkit.api.making": ("merge", "quantize", "recover"),
        "quantkit.api.recipes": ("import_recipe", "plan", "run", "run_all"),
        "quantkit.api.scoring": ("evaluate",),
        "quantkit.pipeline.fitting": ("fit",),
        "quantkit.recipe": ("Recipe",),
        "quantkit.regression.api": ("accept", "check", "history"),
    }.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import quantkit`` stays light."""
    if name == "__version__":
        from quantkit.system.distribution import own_version

        return own_version()
    if name not in _HOMES:
        raise AttributeError(f"module 'quantkit' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
