"""Memory of a model told before it is there: of its file, while it runs, is quantized, and is trained."""

from __future__ import annotations

from quantkit.estimation.estimate import Estimate, estimate, of_variant
from quantkit.estimation.fitting import CardFit, Fit, cards, fits
from quantkit.estimation.lines import Line, Part
from quantkit.estimation.models import anatomy_of, well_known
from quantkit.estimation.use import OVERHEAD, Use

__all__ = [
    "OVERHEAD",
    "CardFit",
    "Estimate",
    "Fit",
    "Line",
    "Part",
    "Use",
    "anatomy_of",
    "cards",
    "estimate",
    "fits",
    "of_variant",
    "well_known",
]
