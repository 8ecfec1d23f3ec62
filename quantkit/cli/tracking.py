"""The command that tells a tracking server of a run that has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.base import app, say


@app.command(rich_help_panel="Runs")
def track(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    uri: Annotated[str | None, typer.Option(help="MLflow's address; that of the recipe or of the environment.")] = None,
    experiment: Annotated[str | None, typer.Option(help="Its experiment; that of the recipe.")] = None,
) -> None:
    """Tell an MLflow server of a run that has ended."""
    from quantkit.publishing.mlflow import track_again

    told = track_again(path, uri, experiment)
    say(f"MLflow at {told['uri']} was told of the run: {told['run_id']}")
