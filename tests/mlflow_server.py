"""A stand-in for an MLflow server: the calls of its REST API that a client needs to log runs, on the loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

API = "/api/2.0/mlflow/"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts/"


@dataclass
class Run:
    """What was logged of one run."""

    name: str
    experiment: str
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    status: str = "RUNNING"


@dataclass
class Server:
    """All that was logged; ``refuse`` answers calls whose path holds it with an error."""

    uri: str = ""
    refuse: str | None = None
    made: int = 0
    experiments: dict[str, str] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    artifacts: dict[str, bytes] = field(default_factory=dict)
    headers: list[dict[str, str]] = field(default_factory=list)

    def call(self, name: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a call; None where there is nothing of that name."""
        if name == "experiments/get-by-name":
            found = self.experiments.get(given["experiment_name"])
            return None if found is None else {"experiment": self._experiment(given["experiment_name"])}
        if name == "experiments/create":
            self.experiments[given["name"]] = str(len(self.experiments) + 1)
            return {"experiment_id": self.experiments[given["name"]]}
        if name == "runs/create":
            self.made += 1
            run_id = f"{self.made:032x}"
            tags = {tag["key"]: tag["value"] for tag in given.get("tags", [])}
            self.runs[run_id] = Run(given["run_name"], given["experiment_id"], tags)
            return {"run": self._run(run_id)}
        if name == "runs/get":
            return {"run": self._run(given["run_id"])}
        if name == "runs/log-batch":
            run = self.runs[given["run_id"]]
            for kind, kept in (("tags", run.tags), ("params", run.params), ("metrics", run.metrics)):
                assert len(given.get(kind, [])) <= 100
                kept.update({each["key"]: each["value"] for each in given.get(kind, [])})
            return {}
        if name == "runs/search":
            mark = given["filter"].split("'")[1]
            return {"runs": [self._run(run_id) for run_id, run in self.runs.items() if mark in run.tags.values()]}
        if name == "runs/delete":
            del self.runs[given["run_id"]]
            return {}
        if name == "runs/update":
            self.runs[given["run_id"]].status = given["status"]
            return {"run_info": self._run(given["run_id"])["info"]}
        return None

    def _experiment(self, name: str) -> dict[str, Any]:
        return {"experiment_id": self.experiments[name], "name": name, "lifecycle_stage": "active"}

    def _run(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        uri = f"mlflow-artifacts:/{run.experiment}/{run_id}/artifacts"
        ids = {"run_id": run_id, "run_uuid": run_id, "experiment_id": run.experiment}
        info = {**ids, "run_name": run.name, "status": run.status, "artifact_uri": uri, "lifecycle_stage": "active"}
        return {"info": info, "data": {}}


@contextmanager
def mlflow_server() -> Iterator[Server]:
    """A server that keeps what it is told, while the block runs."""
    kept = Server()

    class Handler(BaseHTTPRequestHandler):
        """Of this server."""

        def do_GET(self) -> None:
            query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
            self._answer(query)

        def do_POST(self) -> None:
            self._answer(json.loads(self._body() or b"{}"))

        def do_PUT(self) -> None:
            kept.artifacts[urlsplit(self.path).path.removeprefix(ARTIFACTS)] = self._body()
            self._send(200, {})

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _answer(self, given: dict[str, Any]) -> None:
            path = urlsplit(self.path).path
            kept.headers.append(dict(self.headers))
            if kept.refuse is not None and kept.refuse in path:
                self._send(400, {"error_code": "INVALID_PARAMETER_VALUE", "message": f"refused: {path}"})
                return
            found = kept.call(path.removeprefix(API), given)
            missing = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"there is no {path}"}
            self._send(404 if found is None else 200, missing if found is None else found)

        def _send(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        kept.uri = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield kept
        finally:
            server.shutdown()
            thread.join()
