"""The sections ``report``, ``budget``, ``history``, ``retention``, ``tracking`` and ``webhook``: what a run leaves."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from quantkit.recipe.fields import Flag, Place, Section, Whole
from quantkit.system.units import parse_bytes
from quantkit.system.validation import located


def _on_disk(folder: str) -> str:
    if re.match(r"\w[\w+.-]*://", folder):
        raise ValueError(
            f"{folder} is not a folder of a disk: give one; on a cluster, quantkit run --store has results in object"
            " storage as well"
        )
    return folder


class ReportSpec(Section):
    """The folder and the files of the results.

    Attributes:
        folder: everything of the run lies here; ``reports/NAME`` if not given. Relative to where quantkit is run.
        formats: which files are written; the JSON always is.
    """

    folder: Annotated[Place, AfterValidator(_on_disk)] | None = None
    formats: tuple[Literal["html", "md", "json"], ...] = ("html", "md", "json")


def _bytes(given: object) -> object:
    with located():
        return parse_bytes(given) if isinstance(given, int | str) else given


Bytes = Annotated[Whole, Field(ge=1), BeforeValidator(_bytes)]
"""A number of bytes, or a text such as ``8GiB``."""


class BudgetSpec(Section):
    """What the recommended variant may take; the report recommends the least loss within it.

    Attributes:
        size: bytes of its files, or a text such as ``4GiB``.
        memory: bytes that a server needs for weights, the KV cache of one sequence, activations and what the device's
            runtime takes, or a text such as ``8GiB``.
        context: tokens of that sequence; what the model was made for at most.
    """

    size: Bytes | None = None
    memory: Bytes | None = None
    context: Annotated[Whole, Field(ge=1)] = 4096


class HistorySpec(Section):
    """The file in which every run leaves a record.

    Attributes:
        enabled: whether runs are recorded; a check needs its history.
        file: SQLite file; ``history.sqlite`` beside the run's folder if not given, so ``reports/history.sqlite``.
            Relative to where quantkit is run. Recipes may share one.
    """

    enabled: Flag = True
    file: Annotated[Place, Field(min_length=1)] | None = None


class RetentionSpec(Section):
    """How long checks keep the checkpoints of their runs; those of accepted runs are kept until another is accepted.

    Attributes:
        runs: of so many last checks.
        days: of those not older than so many days besides; none if not given.
    """

    runs: Annotated[Whole, Field(ge=1)] = 3
    days: Annotated[Whole, Field(ge=1)] | None = None


_CREDENTIALS = re.compile(r"//[^/@\s]*@")


class MlflowSpec(Section):
    """An MLflow tracking server.

    Attributes:
        uri: its address; the environment variable ``MLFLOW_TRACKING_URI`` if not given.
        experiment: where the runs are listed; it is made if it is not there.
    """

    uri: Annotated[str, Field(min_length=1)] | None = None
    experiment: Annotated[str, Field(min_length=1)] = "quantkit"

    @field_validator("uri")
    @classmethod
    def _holds_no_secret(cls, uri: str | None) -> str | None:
        if uri is not None and _CREDENTIALS.search(uri):
            raise ValueError(
                "credentials do not belong in a recipe: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or"
                " MLFLOW_TRACKING_TOKEN"
            )
        return uri


class TrackingSpec(Section):
    """Which servers are told of a run.

    Attributes:
        mlflow: a tracking server; None tells none.
    """

    mlflow: MlflowSpec | None = None


Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class WebhookSpec(Section):
    """One JSON POST after a check.

    Attributes:
        url_env: environment variable that holds the address, HTTPS or loopback. Recipes are committed, and whoever
            knows the address of a webhook can post to it.
        secret_env: environment variable of a secret with which the body is signed; none if not given.
        on: after every check, or after those alone that did not pass.
    """

    url_env: Variable
    secret_env: Variable | None = None
    on: Literal["always", "failure"] = "failure"
