"""Commands that run, score and report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.base import (
    EXIT_FAILED,
    AllColumns,
    AsJson,
    DryRun,
    RecipePath,
    TrustsCode,
    app,
    bits_given,
    complete_method,
    console,
    names_in,
    say,
    warn,
)
from quantkit.cli.given import columns_of, settings_of, several, weighted

if TYPE_CHECKING:
    from quantkit.recipe import Recipe

PANEL = "Runs"


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
) -> None:
    """Run a recipe: quantize every variant, score it, write the report. Of several recipes also a page of all."""
    from quantkit.api import loaded_recipes

    loaded = loaded_recipes(recipes)
    if dry_run:
        _show_plans(loaded, as_json)
        return
    if len(loaded) > 1 or page is not None:
        _run_several(loaded, install, cluster, as_json=as_json, page=page)
        return
    (recipe,) = loaded
    result = _run_as_json(recipe, install, cluster) if as_json else _run_shown(recipe, install, cluster, all_columns)
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


def _run_several(
    recipes: list[Recipe], install: bool, cluster: str | None, *, as_json: bool, page: Path | None
) -> None:
    """Run recipes and tell of each how it ended and what to take, and where the page is that lists them all."""
    import quantkit
    from quantkit.cli.display import Display
    from quantkit.pipeline.several import page_of
    from quantkit.system.events import EventLog

    place = page_of(recipes) if page is None else page.expanduser()
    if as_json:
        log = EventLog(sys.stdout)
        log.write("start", runs=[recipe.name for recipe in recipes])
        result = quantkit.run_all(recipes, log, page=place, install=install, cluster=cluster)
        log.write("end", status=result["status"], runs=result["runs"], page=str(place))
    else:
        with Display(console(stderr=True)) as display:
            result = quantkit.run_all(recipes, display, page=place, install=install, cluster=cluster)
        for each in result["runs"]:
            chosen = each["recommended"] or {}
            told = each["error"] or f"recommended {chosen.get('variant') or 'none'}"
            say(f"{each['name']}: {each['status']}, {told}")
        say(f"page: {place}")
    if result["status"] == "failed":
        raise typer.Exit(EXIT_FAILED)


def _run_shown(recipe: Recipe, install: bool, cluster: str | None, all_columns: bool) -> dict[str, Any]:
    """Run with progress on standard error, then print the table, the choice, the gates and where the report is."""
    import quantkit
    from quantkit.cli.display import Display

    with Display(console(stderr=True)) as display:
        result = quantkit.run(recipe, display, install=install, cluster=cluster)
    _show(result, all_columns)
    say(f"report: {report_page(recipe)}")
    return result


def _show(content: dict[str, Any], all_columns: bool) -> None:
    """Print the table of a report, its recommendation and the verdicts of its gates."""
    from quantkit import report
    from quantkit.report.terminal import gate_lines

    console().print(report.table(content, everything=all_columns))
    lines = [*gate_lines(content), *report.rounding_lines(content), *report.mix_lines(content)]
    for line in [*lines, *report.recommend(content).lines()]:
        say(line)


def _run_as_json(recipe: Recipe, install: bool, cluster: str | None) -> dict[str, Any]:
    """Run with every event as a line of JSON on standard output; the last says how it ended and where the report is."""
    import quantkit
    from quantkit.pipeline.run import outcome
    from quantkit.system.events import EventLog

    log = EventLog(sys.stdout)
    log.write("start", name=recipe.name, folder=str(recipe.folder))
    try:
        result = quantkit.run(recipe, log, install=install, cluster=cluster)
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


@app.command(rich_help_panel=PANEL)
def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Hub id, folder, GGUF file or package: reference.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder, hub id or archive of a LoRA adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the merged model.")],
    weight: Annotated[float, typer.Option(help="What the adapter's change is multiplied with.")] = 1.0,
    further: Annotated[
        list[str] | None, typer.Option("--with", metavar="ADAPTER[=WEIGHT]", help="One more adapter; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the base's own), float32, float16 or bfloat16.")] = "auto",
    base_weights: Annotated[str, typer.Option(help="original, or nf4 for a QLoRA adapter.")] = "original",
    any_base: Annotated[bool, typer.Option("--any-base", help="Though an adapter names another base.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Decode a base that a tool has quantized.")] = False,
    trust_remote_code: TrustsCode = False,
) -> None:
    """Merge LoRA adapters into a float model."""
    import quantkit
    from quantkit.cli.display import Display

    adapters = [{"source": adapter, "weight": weight}, *(weighted(each, "--with") for each in further or [])]
    with Display(console(stderr=True)) as display:
        found = quantkit.merge(
            base,
            adapters,
            out=out,
            observer=display,
            dtype=dtype,
            base_weights=base_weights,
            any_base=any_base,
            decode=decode,
            trust_remote_code=trust_remote_code,
        )
    for note in found["notes"]:
        say(f"note: {note}", stderr=True)
    say(f"merged: {found['folder']}")


@app.command("import-recipe", rich_help_panel=PANEL)
def import_recipe(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="An export configuration of LLaMA-Factory.")],
) -> None:
    """Print a recipe that does what a LLaMA-Factory export configuration asks for."""
    import quantkit

    say(quantkit.import_recipe(config).rstrip("\n"))


@app.command(rich_help_panel=PANEL)
def quantize(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or package: reference.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the checkpoint.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="See 'quantkit methods'; what goes with scheme and format, or gptq.",
            autocompletion=complete_method,
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="See 'quantkit methods'; what goes with method and format, or int.", autocompletion=names_in("schemes")
        ),
    ] = None,
    bits: Annotated[
        str | None, typer.Option(help="Width of an integer code: 1 to 8, 4 by default; auto chooses by layer.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="With bits auto: bits per weight, as 4.0, or the size of the file, as 5GiB."),
    ] = None,
    choices: Annotated[
        str | None, typer.Option(help="With bits auto: what layers may get, as int3,int4,int8; by default what suits.")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="With bits auto: an allocation.json that is given back, maybe edited.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale; -1 is per channel.")] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Store zero points.")] = False,
    further: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any further key of a variant or its method; repeatable."),
    ] = None,
    format: Annotated[  # noqa: A002 - a recipe key
        str | None,
        typer.Option(
            help="See 'quantkit formats'; what goes with the others, or compressed-tensors.",
            autocompletion=names_in("formats"),
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--for", metavar="WHO", help="Instead: who will load it: ollama, vllm, transformers ..."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="ADAPTER[=WEIGHT]", help="A LoRA adapter to merge first; repeatable."),
    ] = None,
    calibration: Annotated[str, typer.Option(help="Data set or file of records.")] = "alpaca_gpt4",
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="NAME=COLUMN", help="Column of the records, as prompt=ask; repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration records.")] = 128,
    max_length: Annotated[int, typer.Option(help="Tokens per calibration row.")] = 512,
    packing: Annotated[str, typer.Option(help="none is one record a row; full fills every row.")] = "none",
    experts: Annotated[str, typer.Option(help="Tokens that an expert is calibrated on: routed or all.")] = "routed",
    generated: Annotated[
        int | None,
        typer.Option(help="Tokens that the float model writes to calibrate on; by default as many as tuning wants."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    devices: Annotated[
        str | None, typer.Option(help="Several, over which the walk is dealt: all, how many, or names with commas.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of scales and float tensors: auto (16 bits), own, or a dtype.")] = "auto",
    decode: Annotated[bool, typer.Option("--decode", help="Decode a model that a tool has quantized.")] = False,
    trust_remote_code: TrustsCode = False,
    as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:
    """Quantize a model into one checkpoint."""
    import quantkit
    from quantkit.cli.display import Display
    from quantkit.exports.manifest import read_manifest
    from quantkit.system.units import percentage

    given: dict[str, Any] = {
        "bits": bits_given(bits),
        "group_size": group_size,
        "symmetric": False if asymmetric else None,
    }
    given |= {"budget": budget, "choices": choices and choices.split(","), "allocation": allocation}
    options = {key: value for key, value in given.items() if value is not None} | settings_of(further or [])
    keys = {"method": method, "scheme": scheme, "format": format, **options}
    records = {
        "dataset": calibration,
        "samples": samples,
        "max_length": max_length,
        "packing": packing,
        "experts": experts,
        "generated": generated,
        "columns": columns_of(columns or []),
    }
    merged = [weighted(each, "--adapter") for each in adapter or []]
    if dry_run:
        source = {"source": model, "adapter": merged, "dtype": dtype, "decode": decode}
        source["trust_remote_code"] = trust_remote_code
        _plan_one(source, keys, records, {"device": device, "devices": several(devices)}, target, out)
        return
    with Display(console(stderr=True)) as display:
        folder = quantkit.quantize(
            model,
            out=out,
            target=target,
            adapter=merged,
            calibration=records,
            device=device,
            devices=several(devices),
            dtype=dtype,
            decode=decode,
            trust_remote_code=trust_remote_code,
            observer=display,
            **keys,
        )
    facts = read_manifest(folder) or {}
    if as_json:
        say(json.dumps(_told(folder, facts), indent=2))
        return
    if facts.get("share") is not None:
        told = f"{facts['bits_per_weight_file']:.4g} bits per weight of the file"
        say(f"{percentage(facts['share'])} of the block weights quantized, {told}", stderr=True)
    say(f"checkpoint: {folder}")


def _plan_one(
    model: dict[str, Any],
    variant: dict[str, Any],
    records: dict[str, Any],
    where: dict[str, Any],
    target: str | None,
    out: Path,
) -> None:
    """Print what quantizing one checkpoint would do; what has to be converted for that is put away again."""
    import tempfile

    from quantkit.recipe.single import single_recipe

    with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch:
        recipe, lines = single_recipe(
            model, variant, calibration=records, **where, target=target, folder=Path(scratch) / "plan"
        )
        for line in lines:
            say(line, stderr=True)
        show_plan(recipe, out=out)


@app.command(rich_help_panel=PANEL)
def recover(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a checkpoint of quantkit.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new checkpoint.")],
    data: Annotated[str, typer.Option(help="Data set or file of records to train on.")] = "alpaca_gpt4",
    source: Annotated[
        str | None, typer.Option(help="The float model; the one that the checkpoint was made of by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Records.")] = 512,
    max_length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    train: Annotated[
        list[str] | None,
        typer.Option(help="codes, scales, zeros, norms or biases; repeatable. What suits the width by default."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the optimizer; 300 by default.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of scales, relative to their size.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Make a LoRA for the codes as they are instead.")] = False,
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = 16,
    untrained: Annotated[bool, typer.Option("--untrained", help="The adapter as its closed form gives it.")] = False,
    further: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any further option of docs/recover.md; repeatable."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: TrustsCode = False,
    as_json: AsJson = False,
) -> None:
    """Train what a quantized checkpoint stores: closer to the float model, in the same format and size."""
    import quantkit
    from quantkit.cli.display import Display

    given = {"train": train, "steps": steps, "learning_rate": learning_rate}
    options = {key: value for key, value in given.items() if value is not None} | settings_of(further or [])
    records = {"dataset": data, "samples": samples, "max_length": max_length, "packing": "full"}
    with Display(console(stderr=True)) as display:
        found = quantkit.recover(
            checkpoint,
            data=records,
            out=out,
            source=source,
            adapter={"rank": rank, "trained": not untrained} if adapter else None,
            device=device,
            trust_remote_code=trust_remote_code,
            observer=display,
            **options,
        )
    if as_json:
        say(json.dumps(found, indent=2))
        return
    if adapter:
        size, error, left = found["bytes"] / 2**20, found["error"], found["error_left"]
        say(f"adapter: {found['adapter']} ({found['layers']} layers, {size:.1f} MiB)")
        say(f"error of the layers' outputs at the start: {error:.3g} without it, {left:.3g} with it")
        for note in found["notes"]:
            say(note)
        return
    say(f"checkpoint: {found['checkpoint']} ({found['notes'][0]})")


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


def _told(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What ``quantize --json`` prints of a checkpoint: its folder, its sizes, its notes and the calibration audit."""
    from quantkit.exports.manifest import CALIBRATION
    from quantkit.system.artifacts import STAGE_FILE, read_json

    stage = read_json(folder / STAGE_FILE)["facts"]
    audit = folder / CALIBRATION
    return {
        "checkpoint": str(folder),
        **{key: facts.get(key) for key in ("format", "share", "bits_per_weight", "bits_per_weight_file")},
        "notes": stage["notes"],
        "calibration": read_json(audit) if audit.is_file() else None,
    }
