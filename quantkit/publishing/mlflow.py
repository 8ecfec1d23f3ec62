"""Have a process tell the server, and say in one line if it could not."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantkit.errors import MissingDependencyError, OutputError, QuantkitError, RecipeError
from quantkit.recipe import MlflowSpec, TrackingSpec
from quantkit.report.files import REPORT_FILE
from quantkit.report.files import load as load_report
from quantkit.system.artifacts import write_json
from quantkit.system.child import run_child
from quantkit.system.distribution import requirement
from quantkit.system.progress import Observer
from quantkit.system.validation import parse_section

URI = "MLFLOW_TRACKING_URI"
RECORD = "tracking.json"
ARTIFACTS = ("report.json", "report.html", "report.md")
"""Files of a run's folder that go with it, as far as they are there."""
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""How long a server that does not answer is waited for, unless the environment says otherwise."""
SECRETS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_USERNAME")
LONGEST_ERROR = 500
_CREDENTIALS = re.compile(r"//[^/@\s]*@")


def check_tracking(spec: TrackingSpec) -> None:
    """Check before any work that a server is named and can be spoken with.

    Raises:
        RecipeError: there is no address.
        MissingDependencyError: MLflow is not installed.
    """
    if spec.mlflow is not None:
        _uri(spec.mlflow)
        _check_package()


def track(spec: MlflowSpec, folder: Path) -> dict[str, str]:
    """Tell a server of the run in a folder; what was told is noted in ``tracking.json`` there.

    Args:
        spec: the server.
        folder: of a run, with its ``report.json``.

    Returns:
        ``uri`` without credentials, ``experiment``, ``run_id`` and ``experiment_id``.

    Raises:
        RecipeError: there is no address.
        MissingDependencyError: MLflow is not installed.
        OutputError: the server cannot be reached, or refuses.
        QuantkitError: there is no report in the folder.
    """
    uri = _uri(spec)
    _check_package()
    load_report(folder)
    files = [str(folder / name) for name in ARTIFACTS if (folder / name).is_file()]
    with tempfile.TemporaryDirectory(prefix="quantkit-tracking-") as scratch:
        job = {"report": str(folder / REPORT_FILE), "uri": uri, "experiment": spec.experiment, "files": files}
        command = [sys.executable, "-m", "quantkit.publishing.mlflow_worker"]
        ending = run_child(command, job, Path(scratch), environment=_environment(), log=Path(scratch) / "log")
        found = ending.result or {"error": {"kind": "its process", "problem": ending.last_line()}}
    where = _redacted(uri)
    if "error" in found:
        why = "{kind}: {problem}".format_map(found["error"])
        problem = f"MLflow at {where} was not told of the run: {_redacted(why)[:LONGEST_ERROR]}"
        raise OutputError(problem, f"nothing is lost; tell it later: quantkit track {folder}")
    told = {"uri": where, "experiment": spec.experiment, **found}
    write_json(folder / RECORD, told)
    return told


def track_again(folder: Path, uri: str | None = None, experiment: str | None = None) -> dict[str, str]:
    """Tell a server of a run that has ended: the one given, else that of its recipe, else that of the environment.

    Raises:
        QuantkitError: see :func:`track`.
    """
    found: Any = load_report(folder)
    for key in ("recipe", "tracking", "mlflow"):
        found = found.get(key) if isinstance(found, dict) else None
    asked = dict(found) if isinstance(found, dict) else {}
    asked |= {key: value for key, value in (("uri", uri), ("experiment", experiment)) if value is not None}
    return track(parse_section(MlflowSpec, asked, "tracking.mlflow"), folder)


def track_after(spec: TrackingSpec, folder: Path, observer: Observer) -> None:
    """Tell the servers of a run that has ended; one that cannot be told costs a note and not the run."""
    if spec.mlflow is None:
        return
    observer.stage(f"tracking: MLflow, experiment {spec.mlflow.experiment}")
    try:
        told = track(spec.mlflow, folder)
    except QuantkitError as error:
        observer.note(str(error))
        return
    observer.note(f"MLflow at {told['uri']} was told of the run: {told['run_id']}")


def _uri(spec: MlflowSpec) -> str:
    uri = spec.uri or os.environ.get(URI)
    if not uri:
        raise RecipeError("tracking.mlflow has no uri", f"give it, or set the environment variable {URI}")
    return uri


def _check_package() -> None:
    if importlib.util.find_spec("mlflow") is None:
        raise MissingDependencyError("mlflow-skinny", "the section 'tracking'", requirement("mlflow"))


def _environment() -> dict[str, str]:
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    return {**PATIENCE, **os.environ, **quiet}


def _redacted(text: str) -> str:
    """A text on one line without credentials."""
    text = _CREDENTIALS.sub("//***@", " ".join(text.split()))
    for name in SECRETS:
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, "***")
    return text
