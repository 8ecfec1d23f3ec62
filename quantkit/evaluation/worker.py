"""The process that scores one checkpoint: ``python -m quantkit.evaluation.worker JOB.json``."""

from __future__ import annotations

import sys
from typing import Any

from quantkit.evaluation.job import EvaluationJob
from quantkit.system.garbage import no_garbage_collection
from quantkit.system.worker import Report, serve


def perform(job: Any, report: Report) -> dict[str, Any]:
    """Score; see :func:`quantkit.evaluation.evaluate.evaluate`."""
    with no_garbage_collection():
        from quantkit.evaluation.evaluate import evaluate  # imports torch, whose messages belong in the log

    return evaluate(EvaluationJob.from_json(job), report)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], perform))
