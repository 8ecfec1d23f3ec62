"""The quantize stage: a float checkpoint and a calibration set in, one checkpoint per variant out."""

from __future__ import annotations

from quantkit.quantize.plan import Layers, plan_layers
from quantkit.quantize.stage import Job, Quantized, made_from, quantize

__all__ = ["Job", "Layers", "Quantized", "made_from", "plan_layers", "quantize"]
