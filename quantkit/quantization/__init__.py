"""The quantize stage: a float checkpoint and a calibration set in, one checkpoint per variant out."""

from __future__ import annotations

from quantkit.quantization.job import Job, Quantized, Wanted, finished_variant, made_from
from quantkit.quantization.plan import Layers, plan_layers
from quantkit.quantization.stage import quantize, quantize_together, walks
from quantkit.quantization.walk_variants import WalkJob, run_walk

__all__ = [
    "Job",
    "Layers",
    "Quantized",
    "WalkJob",
    "Wanted",
    "finished_variant",
    "made_from",
    "plan_layers",
    "quantize",
    "quantize_together",
    "run_walk",
    "walks",
]
