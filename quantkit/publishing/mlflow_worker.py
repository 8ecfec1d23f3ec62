"""The process that speaks with an MLflow server: ``python -m quantkit.publishing.mlflow_worker JOB.json``.

The job has ``report``, ``uri``, ``experiment`` and ``files``. The recipe becomes a run on the server, with a nested one
for each variant; the result is the ids of the first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.publishing.mlflow_record import Tracked, tracked
from quantkit.system.artifacts import read_json
from quantkit.system.worker import Report, serve

PARENT = "mlflow.parentRunId"
BATCH = 100
"""Parameters, tags or metrics that a request may hold at most, by MLflow's own limits."""


def log(record: Tracked, uri: str, experiment: str, files: list[Path]) -> dict[str, str]:
    """Log a run.

    Args:
        record: what is logged.
        uri: of the server.
        experiment: its name; it is made if it is not there.
        files: what goes with the run as artifacts.

    Returns:
        ``run_id`` and ``experiment_id``.

    Raises:
        Exception: whatever MLflow raises where the server cannot be reached, or refuses.
    """
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    there = client.get_experiment_by_name(experiment)
    place = client.create_experiment(experiment) if there is None else there.experiment_id
    run_id = _log_one(client, place, record, {})
    for variant in record.nested:
        _end(client, _log_one(client, place, variant, {PARENT: run_id}), variant)
    for file in files:
        client.log_artifact(run_id, str(file))
    _end(client, run_id, record)
    return {"run_id": run_id, "experiment_id": str(place)}


def _log_one(client: Any, experiment: str, record: Tracked, tags: Mapping[str, str]) -> str:
    """Begin a run with all that is known of it; returns its id."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.utils.time import get_current_time_millis

    run_id = str(client.create_run(experiment, run_name=record.name, tags=dict(tags)).info.run_id)
    now = get_current_time_millis()
    for params in _batches([Param(key, value) for key, value in record.params.items()]):
        client.log_batch(run_id, params=params)
    for found in _batches([RunTag(key, value) for key, value in record.tags.items()]):
        client.log_batch(run_id, tags=found)
    for metrics in _batches([Metric(key, value, now, 0) for key, value in record.metrics.items()]):
        client.log_batch(run_id, metrics=metrics)
    return run_id


def _end(client: Any, run_id: str, record: Tracked) -> None:
    client.set_terminated(run_id, status="FAILED" if record.failed else "FINISHED")


def _batches(values: list[Any]) -> Iterator[list[Any]]:
    return (values[start : start + BATCH] for start in range(0, len(values), BATCH))


def perform(job: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Log what a job names; whatever MLflow raises is told to whoever asked, who says it in one line."""
    try:
        record = tracked(read_json(Path(job["report"])))
        return log(record, job["uri"], job["experiment"], [Path(file) for file in job["files"]])
    except Exception as error:  # MLflow raises whatever its transport does
        return {"error": {"kind": type(error).__name__, "problem": str(error)}}


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], perform))
