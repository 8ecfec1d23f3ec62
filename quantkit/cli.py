"""The command line: one thin command per public function."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from quantkit.errors import EXIT_USER_ERROR, QuantkitError

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class _Commands(TyperGroup):
    """The commands: a mistake of the user prints one line and exits with code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except QuantkitError as error:
            _say(f"error: {error}", stderr=True)
            raise typer.Exit(EXIT_USER_ERROR) from error
        except KeyboardInterrupt as error:
            _say("interrupted: what is finished is kept, the same command goes on from there", stderr=True)
            raise typer.Exit(EXIT_INTERRUPTED) from error


app = typer.Typer(
    cls=_Commands,
    name="quantkit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        _say(f"quantkit {version('quantkit')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize, export and compare large language models: one recipe, one calibration set, one report."""


@app.command()
def run(recipe: RecipePath) -> None:
    """Run a recipe: quantize every variant, score it, write the report."""
    import quantkit
    from quantkit import report
    from quantkit.display import Display

    loaded = quantkit.Recipe.load(recipe)
    console = _console(stderr=True)
    with Display(console) as display:
        result = quantkit.run(loaded, display)
    _console().print(report.table(result))
    for verdict in result["gates"]:
        state = "passed" if verdict["passed"] else "FAILED"
        _say(f"gate {state}: {verdict['variant']}: {verdict['gate']}")
    _say(
        f"report: {loaded.folder / 'report.html' if 'html' in loaded.report.formats else loaded.folder / 'report.json'}"
    )
    if result["status"] == "failed":
        raise typer.Exit(EXIT_FAILED)


@app.command()
def validate(recipe: RecipePath) -> None:
    """Check a recipe without loading anything."""
    from quantkit.recipe import Recipe

    loaded = Recipe.load(recipe)
    _say(f"{recipe} is valid: {len(loaded.variants)} variants of {loaded.model.source}, results in {loaded.folder}")


@app.command()
def plan(recipe: RecipePath, as_json: AsJson = False) -> None:
    """Print what a run would do, with estimated bytes and what would be reused.

    The model is fetched or converted if it is not here yet.
    """
    import quantkit

    found = quantkit.plan(recipe)
    if as_json:
        _say(json.dumps(found, indent=2))
        return
    _console().print(_plan_table(found))


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or package: reference.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the checkpoint.")],
    method: Annotated[str, typer.Option(help="See 'quantkit methods'.")] = "gptq",
    bits: Annotated[int, typer.Option(help="Width of a code: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale; -1 is per channel.")] = 64,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Store zero points.")] = False,
    format: Annotated[str, typer.Option(help="See 'quantkit formats'.")] = "compressed-tensors",  # noqa: A002
    calibration: Annotated[str, typer.Option(help="Data set or file of records.")] = "alpaca_gpt4",
    samples: Annotated[int, typer.Option(help="Calibration records.")] = 128,
    max_length: Annotated[int, typer.Option(help="Tokens per calibration row.")] = 512,
) -> None:
    """Quantize a model into one checkpoint."""
    import quantkit
    from quantkit.display import Display

    with Display(_console(stderr=True)) as display:
        folder = quantkit.quantize(
            model,
            out=out,
            method=method,
            bits=bits,
            group_size=group_size,
            symmetric=not asymmetric,
            format=format,
            calibration={"dataset": calibration, "samples": samples, "max_length": max_length},
            observer=display,
        )
    _say(f"checkpoint: {folder}")


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    texts: Annotated[list[str] | None, typer.Option("--text", help="prose, answers, or a file; repeatable.")] = None,
    reference: Annotated[str | None, typer.Option(help="The float model to compare with.")] = None,
    context_length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens scored per text at most.")] = 8192,
) -> None:
    """Score a checkpoint in a fresh process and print the figures as JSON."""
    import quantkit
    from quantkit.display import Display

    with Display(_console(stderr=True)) as display:
        result = quantkit.evaluate(
            checkpoint,
            texts=texts,
            reference=reference,
            observer=display,
            context_length=context_length,
            max_tokens=max_tokens,
        )
    _say(json.dumps(result, indent=2))


@app.command()
def methods() -> None:
    """List the methods and their options."""
    from quantkit.methods import METHODS

    for method in METHODS:
        _say(f"{method.name}: {method.summary} [{method.source}]")
        for name, field in method.Options.model_fields.items():
            _say(f"    {name} = {field.default}")
    for name, reason in METHODS.broken().items():
        _say(f"{name}: cannot be used: {reason}")


@app.command()
def formats() -> None:
    """List the formats and who loads them."""
    from quantkit.formats import FORMATS

    for each in FORMATS:
        _say(f"{each.name}: {each.summary} [{', '.join(each.runtimes)}]")
    for name, reason in FORMATS.broken().items():
        _say(f"{name}: cannot be used: {reason}")


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="Folder of a run, or its report.json.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; the run's own by default.")] = None,
) -> None:
    """Render a run's report again from its JSON, as HTML and Markdown."""
    from quantkit import report as reports

    content = reports.load(path)
    folder = out or (path if path.is_dir() else path.parent)
    for written in reports.write(content, folder, ("html", "md")):
        _say(str(written))


def main() -> None:
    """The entry point; a request to terminate unwinds the run, so that nothing half-written stays."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(_number: int, _frame: object) -> None:
    raise SystemExit(EXIT_TERMINATED)


def _plan_table(found: dict[str, Any]) -> Any:
    from rich.table import Table

    source, calibration = found["source"], found["calibration"]
    title = f"{source['reference']} ({source['dtype']}, {_size(source['size_bytes'])})"
    table = Table(title=title, caption=f"results in {found['folder']}", title_justify="left", caption_justify="left")
    for column in ("stage", "what", "estimated size", "calibration pass", "state"):
        table.add_column(column)
    if calibration is not None:
        rows = f"{calibration['samples']} records, {calibration['max_length']} tokens each at most"
        table.add_row("calibration", calibration["dataset"], "", rows, calibration["state"])
    table.add_row("baseline", "float model", _size(source["size_bytes"]), "", found["baseline"])
    for variant in found["variants"]:
        quantized, linears = variant["layers"]
        what = f"{variant['method']} {variant['scheme']} {variant['format']}, {quantized} of {linears} linear layers"
        table.add_row(variant["name"], what, _size(variant["size_bytes"]), variant["strategy"], variant["state"])
    return table


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=160)


def _say(text: str, stderr: bool = False) -> None:
    typer.echo(text, err=stderr)
