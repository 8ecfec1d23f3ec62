"""Score an exported checkpoint: perplexity, divergence from the float model, memory and speed.

A job runs in a process of its own, so that it loads the files as they were exported, its peak memory is
its own, and its death takes nothing else along. This module imports without torch; what runs inside the
process does not: ``quantkit.evaluation.evaluate.evaluate`` and ``quantkit.evaluation.scoring.score``.
"""

from __future__ import annotations

from quantkit.evaluation.job import EvaluationJob
from quantkit.evaluation.process import run_job

__all__ = ["EvaluationJob", "run_job"]
