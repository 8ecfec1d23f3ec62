"""The section ``tracking``: which servers are told of a run."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from quantkit.recipe.fields import Section

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
