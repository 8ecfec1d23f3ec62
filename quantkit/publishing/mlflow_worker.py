"""The process that speaks with the server: ``python -m quantkit.publishing.mlflow_worker JOB.json``.

The job has ``report``, ``uri``, ``experiment`` and ``files``. It writes ``result.json`` beside the job's file: the ids
of the run, or ``error`` in one line.
"""

from __future__ import annotations

import sys
from pathlib import Path

from quantkit.errors import EXIT_USER_ERROR
from quantkit.publishing.mlflow_client import log
from quantkit.publishing.mlflow_record import tracked
from quantkit.system.artifacts import read_json, write_json

RESULT = "result.json"


def main(arguments: list[str]) -> int:
    """Carry out the job in the file ``arguments[0]``; returns the exit code."""
    job_file = Path(arguments[0])
    job = read_json(job_file)
    files = [Path(file) for file in job["files"]]
    try:
        result = log(tracked(read_json(Path(job["report"]))), job["uri"], job["experiment"], files)
    except Exception as error:  # MLflow raises whatever its transport does; the process that asked says it in one line
        write_json(job_file.with_name(RESULT), {"error": f"{type(error).__name__}: {error}"})
        return EXIT_USER_ERROR
    write_json(job_file.with_name(RESULT), result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
