"""Commands that run recipes, score and report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from quantkit.cli.base import (
    EXIT_FAILED,
    VOICE,
    AllColumns,
    AsJson,
    DryRun,
    RecipePath,
    TrustsCode,
    app,
    console,
    say,
    warn,
)

if TYPE_CHECKING:
    from quantkit.recipe import Recipe

PANEL = "Runs"


class Where(NamedTuple):
    """The cluster that works, and what lies between its nodes; None is this machine."""

    cluster: str | None
    store: str | None


@app.command(rich_help_panel=PANEL)
def run(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipe files (YAML), one or several.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what happens as JSON lines; see docs/report.md.")
    ] = False,
    install: Annotated[
        bool, typer.Option("--install/--no-install", help="Install environments of libraries that are not there.")
    ] = True,
    dry_run: DryRun = False,
    all_columns: AllColumns = False,
    page: Annotated[
        Path | None, typer.Option(help="Where the page of several runs goes; runs.html above their folders by default.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on the nodes of a Ray cluster; auto is this machine's.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Object storage between nodes that share no folder: s3://bucket/x."),
    ] = None,
) -> None:
    """Run a recipe: quantize every variant, score it, write the report. Of several recipes also a page of all."""
    from quantkit.api.recipes import loaded_recipes

    loaded, where = loaded_recipes(recipes), Where(cluster, store)
    if dry_run:
        _show_plans(loaded, as_json)
        return
    if len(loaded) > 1 or page is not None:
        _run_several(loaded, install, where, as_json=as_json, page=page)
        return
    (recipe,) = loaded
    result = _run_as_json(recipe, install, where) if as_json else _run_shown(recipe, install, where, all_columns)
    if result["status"] == "failed":
        raise typer.Exit(EXIT_FAILED)


def _show_plans(recipes: list[Recipe], as_json: bool) -> None:
    """Print the plan of each recipe; one that cannot run makes the exit code 1."""
    code = 0
    for recipe in recipes:
        try:
            show_plan(recipe, as_json)
        except typer.Exit as ended:
            code = code or ended.exit_code
    if code:
        raise typer.Exit(code)


def _run_several(recipes: list[Recipe], install: bool, where: Where, *, as_json: bool, page: Path | None) -> None:
    """Run recipes and tell of each how it ended and what to take, and where the page is that lists them all."""
    import quantkit
    from quantkit.cli.display import Display
    from quantkit.pipeline.several import page_of
    from quantkit.system.events import EventLog

    place = page_of(recipes) if page is None else page.expanduser()
    if as_json:
        log = EventLog(sys.stdout)
        log.write("start", runs=[recipe.name for recipe in recipes])
        result = quantkit.run_all(recipes, log, page=place, install=install, cluster=where.cluster, store=where.store)
        log.write("end", status=result["status"], runs=result["runs"], page=str(place))
    else:
        with Display(console(stderr=True)) as display:
            result = quantkit.run_all(
                recipes, display, page=place, install=install, cluster=where.cluster, store=where.store
            )
        for each in result["runs"]:
            chosen = each["recommended"] or {}
            told = each["error"] or f"recommended {chosen.get('variant') or 'none'}"
            say(f"{each['name']}: {each['status']}, {told}")
        say(f"page: {place}")
    if result["status"] == "failed":
        raise typer.Exit(EXIT_FAILED)


def _run_shown(recipe: Recipe, install: bool, where: Where, all_columns: bool) -> dict[str, Any]:
    """Run with progress on standard error, then print the table, the choice, the gates and where the report is."""
    import quantkit
    from quantkit.cli.display import Display

    with Display(console(stderr=True)) as display:
        result = quantkit.run(recipe, display, install=install, cluster=where.cluster, store=where.store)
    _show(result, all_columns, errors_told=console().is_terminal and not VOICE.quiet)
    say(f"report: {report_page(recipe)}")
    return result


def _show(content: dict[str, Any], all_columns: bool, *, errors_told: bool = False) -> None:
    """Print the table of a report, its recommendation and the verdicts of its gates.

    Why a variant failed is said once: by progress where that and this go to one terminal, else below the table.
    """
    from quantkit import report
    from quantkit.report.terminal import gate_lines

    console().print(report.table(content, everything=all_columns, errors_told=errors_told))
    lines = [*gate_lines(content), *report.rounding_lines(content), *report.mix_lines(content)]
    for line in [*lines, *report.recommend(content).lines()]:
        say(line)


def _run_as_json(recipe: Recipe, install: bool, where: Where) -> dict[str, Any]:
    """Run with every event as a line of JSON on standard output; the last says how it ended and where the report is."""
    import quantkit
    from quantkit.pipeline.run import outcome
    from quantkit.system.events import EventLog

    log = EventLog(sys.stdout)
    log.write("start", name=recipe.name, folder=str(recipe.folder))
    try:
        result = quantkit.run(recipe, log, install=install, cluster=where.cluster, store=where.store)
    except BaseException as error:
        log.write("error", kind=type(error).__name__, text=str(error))
        raise
    log.write("end", **outcome(result), report=str(report_page(recipe)))
    return result


def report_page(recipe: Recipe) -> Path:
    """The report that a person opens first."""
    return recipe.folder / ("report.html" if "html" in recipe.report.formats else "report.json")


@app.command(rich_help_panel=PANEL)
def validate(recipe: RecipePath) -> None:
    """Check a recipe without loading anything: its keys, and whether the files that it names are there."""
    from quantkit.errors import QuantkitError
    from quantkit.recipe import Recipe
    from quantkit.recipe.local_files import local_files, missing

    loaded = Recipe.load(recipe)
    warn(loaded.warnings())
    if absent := missing(local_files(loaded), recipe):
        raise QuantkitError.together(absent)
    say(f"{recipe} is valid: {len(loaded.variants)} variants of {loaded.model.source}, results in {loaded.folder}")


@app.command(rich_help_panel=PANEL)
def plan(
    recipe: RecipePath,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Run the blocks up to the largest with one batch, and tell what it took.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a run would do and take, with estimated bytes and what would be reused.

    The model is fetched or converted if it is not here yet.
    """
    from quantkit.recipe import Recipe

    show_plan(Recipe.load(recipe), as_json, rehearse=rehearse)


def show_plan(recipe: Recipe, as_json: bool = False, out: Path | None = None, *, rehearse: bool = False) -> None:
    """Print the plan of a recipe, whose results go to ``out``; a variant that cannot run makes the exit code 1."""
    import quantkit
    from quantkit.cli.tables import cannot_run, plan_notes, plan_table, rehearsal_notes, rehearsal_table, stages_table

    found = quantkit.plan(recipe, rehearse=rehearse)
    found["folder"] = found["folder"] if out is None else str(out)
    warn(found["warnings"])
    if as_json:
        say(json.dumps(found, indent=2))
    else:
        console().print(plan_table(found))
        if found["stages"]:
            console().print(stages_table(found))
        if rehearse:
            console().print(rehearsal_table(found["rehearsal"]))
            for note in rehearsal_notes(found["rehearsal"]):
                say(note)
        for note in plan_notes(found):
            say(note)
    failed = found["rehearsal"]["failures"] if rehearse else {}
    if failed or any(cannot_run(variant) for variant in found["variants"]):
        raise typer.Exit(EXIT_FAILED)


@app.command("import-recipe", rich_help_panel=PANEL)
def import_recipe(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="An export configuration of LLaMA-Factory.")],
) -> None:
    """Print a recipe that does what a LLaMA-Factory export configuration asks for."""
    import quantkit

    say(quantkit.import_recipe(config).rstrip("\n"))


@app.command(rich_help_panel=PANEL)
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a checkpoint, a GGUF file, or a hub id.")],
    texts: Annotated[list[str] | None, typer.Option("--text", help="prose, answers, or a file; repeatable.")] = None,
    reference: Annotated[str | None, typer.Option(help="The float model to compare with.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter that recover made for it.")] = None,
    context_length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens scored per text at most.")] = 8192,
    bos: Annotated[str, typer.Option(help="Where a BOS token stands: before each window, stream or none.")] = "window",
    loader: Annotated[
        str, typer.Option("--loader", "--runtime", help="auto, whole, streamed, or a name of 'quantkit runtimes'.")
    ] = "auto",
    python: Annotated[
        str | None, typer.Option(metavar="PATH", help="Interpreter of the environment that vllm lives in.")
    ] = None,
    batch_sizes: Annotated[
        list[int] | None, typer.Option("--batch-size", help="Rows at once whose speed is taken; repeatable.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Of lm-evaluation-harness: a name or a file; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    trust_remote_code: TrustsCode = False,
    as_json: AsJson = False,
) -> None:
    """Score a checkpoint in a fresh process and print the figures."""
    import quantkit
    from quantkit.cli.display import Display
    from quantkit.cli.figures import figure_table

    with Display(console(stderr=True)) as display:
        result = quantkit.evaluate(
            checkpoint,
            texts=texts,
            reference=reference,
            adapter=adapter,
            observer=display,
            context_length=context_length,
            max_tokens=max_tokens,
            bos=bos,
            loader=loader,
            python=python,
            batch_sizes=batch_sizes or [1],
            tasks=tasks or [],
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        say(json.dumps(result, indent=2))
    else:
        console().print(figure_table(result, checkpoint))


@app.command(rich_help_panel=PANEL)
def report(
    path: Annotated[Path, typer.Argument(help="Folder of a run, or its report.json.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; the run's own by default.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Print the table and the choice, and write nothing.")] = False,
    all_columns: AllColumns = False,
) -> None:
    """Render a run's report again from its JSON, as HTML and Markdown."""
    from quantkit import report as reports

    if table or all_columns:
        _show(reports.load(path), all_columns)
        return
    folder = out or (path if path.is_dir() else path.parent)
    for written in reports.render_again(path, folder, ("html", "md")):
        say(str(written))
