"""A run: from a recipe to a report."""

from __future__ import annotations

from quantkit.pipeline.jobs import job_of, needs_calibration, quantize_job
from quantkit.pipeline.run import run

__all__ = ["job_of", "needs_calibration", "quantize_job", "run"]
