"""The process that speaks with an MLflow server: ``python -m quantkit.publishing.mlflow_worker JOB.json``.

The job has ``report``, ``uri``, ``experiment`` and ``files``. The recipe becomes a run on the server, with a nested one
for each variant; the result is the ids of the first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.publishing.mlflow_record import REPORT, Tracked, tracked
from quantkit.system.artifacts import read_json
from quantkit.system.worker import Report, serve

PARENT = "mlflow.parentRunId"
BATCH = 100
"""Parameters, tags or metrics that a request may hold at most, by MLflow's own limits."""


def log(record: Tracked, uri: str, experiment: str, files: list[Path]) -> dict[str, str]:
    """Log a run; runs of the same report that were logged before give way to it.

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
    place = str(client.create_experiment(experiment) if there is None else there.experiment_id)
    earlier = [] if there is None else _runs_of(client, place, record)
    begun: list[str] = []
    try:
        run_id = _log_one(client, place, record, {}, begun)
        for variant in record.nested:
            _end(client, _log_one(client, place, variant, {PARENT: run_id}, begun), variant)
        for file in files:
            client.log_artifact(run_id, str(file))
        _end(client, run_id, record)
    except BaseException:
        _remove(client, begun)
        raise
    _remove(client, earlier)
    return {"run_id": run_id, "experiment_id": place}


def _runs_of(client: Any, experiment: str, record: Tracked) -> list[str]:
    """The runs that an earlier telling of the same report left, whole or half."""
    wanted = f"tags.`{REPORT}` = '{record.tags[REPORT]}'"
    return [str(run.info.run_id) for run in client.search_runs([experiment], filter_string=wanted)]


def _remove(client: Any, runs: list[str]) -> None:
    """Take runs off the server's list, so that none is left as if it were running."""
    for run_id in runs:
        try:
            client.set_terminated(run_id, status="KILLED")
            client.delete_run(run_id)
        except Exception as error:  # the server may be gone, and what went wrong before is what is told
            print(f"run {run_id} is left on the server: {error}", file=sys.stderr)  # noqa: T201 - to the worker's log


def _log_one(client: Any, experiment: str, record: Tracked, tags: Mapping[str, str], begun: list[str]) -> str:
    """Begin a run with all that is known of it; returns its id, which is also put beside those that were begun."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.utils.time import get_current_time_millis

    marked = {**tags, REPORT: record.tags[REPORT]}
    run_id = str(client.create_run(experiment, run_name=record.name, tags=marked).info.run_id)
    begun.append(run_id)
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
