"""Commands about runs over time: check, accept, history, and track for a server that keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.base import AllColumns, AsJson, DryRun, RecipePath, app, console, say
from quantkit.cli.running import show_plan

PANEL = "Runs over time"
SHOW = "show"
File = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="The history; reports/history.sqlite by default.")
]
RecipeName = Annotated[str | None, typer.Option("--name", help="Name of the recipe.")]


@app.command(rich_help_panel=PANEL)
def check(
    recipe: RecipePath,
    as_json: AsJson = False,
    install: Annotated[
        bool, typer.Option("--install/--no-install", help="Install environments of libraries that are not there.")
    ] = True,
    dry_run: DryRun = False,
) -> None:
    """Run a recipe and judge it beside the accepted run: 0 passed, 1 regressed, 2 cannot be told or could not run."""
    import quantkit
    from quantkit.cli.display import Display
    from quantkit.regression.api import check as check_recipe
    from quantkit.regression.document import to_json
    from quantkit.regression.pages.render import HTML
    from quantkit.regression.terminal import rendered

    loaded = quantkit.Recipe.load(recipe)
    if dry_run:
        show_plan(loaded, as_json)
        return
    with Display(console(stderr=True)) as display:
        found = check_recipe(loaded, display, install=install)
    if as_json:
        say(json.dumps(to_json(found), indent=2, ensure_ascii=False))
    else:
        console().print(rendered(found))
        say(f"page: {loaded.folder / HTML}")
    if found.exit_code:
        raise typer.Exit(found.exit_code)


@app.command(rich_help_panel=PANEL)
def accept(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Number of a run, or latest.")],
    recipe: Annotated[Path | None, typer.Option("--recipe", metavar="RECIPE", help="Whose history it is.")] = None,
    file: File = None,
    name: RecipeName = None,
    variants: Annotated[
        list[str] | None, typer.Option("--variant", help="Accept this variant alone; repeatable.")
    ] = None,
) -> None:
    """Make a run the reference that later checks are compared with."""
    from quantkit.regression.api import accept as accept_run

    found = accept_run(run, recipe=recipe, file=file, name=name, variants=variants or ())
    say(f"run {found['id']} of {found['name']} is the reference of {', '.join(found['accepted'])}")


@app.command(rich_help_panel=PANEL)
def history(
    what: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe file, or: show [RUN].")] = None,
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", hidden=True)] = None,
    file: File = None,
    name: RecipeName = None,
    variant: Annotated[str | None, typer.Option(help="Runs that have this variant.")] = None,
    status: Annotated[
        str | None, typer.Option(help="ok, failed, error, interrupted, or passed, regressed, unknown.")
    ] = None,
    since: Annotated[str | None, typer.Option(metavar="DATE", help="Runs that began then or later.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="The newest so many.")] = None,
    all_columns: AllColumns = False,
    as_json: AsJson = False,
) -> None:
    """List the recorded runs, or show one, the latest or a number: quantkit history show [RUN]."""
    if what == SHOW:
        _show(run or "latest", file, as_json)
        return
    from quantkit.regression.api import recorded
    from quantkit.run_history.terminal import runs_table, to_json

    recipe = None if what is None else Path(what)
    found = recorded(recipe, file=file, name=name, variant=variant, status=status, since=since, last=last)
    if as_json:
        say(json.dumps([to_json(record) for record in found], indent=2, ensure_ascii=False))
    else:
        console().print(runs_table(found, variant, everything=all_columns))


def _show(run: str, file: Path | None, as_json: bool) -> None:
    from quantkit.regression.api import recorded_run
    from quantkit.run_history.terminal import run_lines, to_json

    record = recorded_run(run, file=file)
    for line in [json.dumps(to_json(record), indent=2, ensure_ascii=False)] if as_json else run_lines(record):
        say(line)


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
