"""The command line: one thin command per public function."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable
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
    _warn(loaded.warnings())
    _say(f"{recipe} is valid: {len(loaded.variants)} variants of {loaded.model.source}, results in {loaded.folder}")


@app.command()
def plan(recipe: RecipePath, as_json: AsJson = False) -> None:
    """Print what a run would do, with estimated bytes and what would be reused.

    The model is fetched or converted if it is not here yet.
    """
    import quantkit
    from quantkit.listing import plan_table

    found = quantkit.plan(recipe)
    _warn(found["warnings"])
    if as_json:
        _say(json.dumps(found, indent=2))
        return
    _console().print(plan_table(found))


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file or package: reference.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the checkpoint.")],
    method: Annotated[str, typer.Option(help="See 'quantkit methods'.")] = "gptq",
    scheme: Annotated[str, typer.Option(help="Kind of scheme; 'quantkit methods' lists them with their keys.")] = "int",
    bits: Annotated[int | None, typer.Option(help="Width of an integer code: 1 to 8; 4 by default.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale; -1 is per channel.")] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Store zero points.")] = False,
    further: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any further key of a variant or its method; repeatable."),
    ] = None,
    format: Annotated[  # noqa: A002 - a recipe key
        str, typer.Option(help="See 'quantkit formats'.")
    ] = "compressed-tensors",
    calibration: Annotated[str, typer.Option(help="Data set or file of records.")] = "alpaca_gpt4",
    samples: Annotated[int, typer.Option(help="Calibration records.")] = 128,
    max_length: Annotated[int, typer.Option(help="Tokens per calibration row.")] = 512,
) -> None:
    """Quantize a model into one checkpoint."""
    import quantkit
    from quantkit.display import Display

    given = {"bits": bits, "group_size": group_size, "symmetric": False if asymmetric else None}
    options = {key: value for key, value in given.items() if value is not None} | _settings(further or [])
    with Display(_console(stderr=True)) as display:
        folder = quantkit.quantize(
            model,
            out=out,
            calibration={"dataset": calibration, "samples": samples, "max_length": max_length},
            observer=display,
            **{"method": method, "scheme": scheme, "format": format, **options},
        )
    _say(f"checkpoint: {folder}")


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    texts: Annotated[list[str] | None, typer.Option("--text", help="prose, answers, or a file; repeatable.")] = None,
    reference: Annotated[str | None, typer.Option(help="The float model to compare with.")] = None,
    context_length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens scored per text at most.")] = 8192,
    loader: Annotated[str, typer.Option(help="auto, transformers, or reference (quantkit's own decoder).")] = "auto",
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
            loader=loader,
        )
    _say(json.dumps(result, indent=2))


@app.command()
def methods() -> None:
    """List the methods with their options, and the schemes."""
    from quantkit.listing import method_lines

    for line in method_lines():
        _say(line)


@app.command()
def formats() -> None:
    """List the formats: which schemes each stores, and who loads it."""
    from quantkit.listing import format_lines

    for line in format_lines():
        _say(line)


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


def _settings(given: list[str]) -> dict[str, Any]:
    """Keys and values of ``--set``, the values as YAML reads them.

    Raises:
        RecipeError: one is not of the form KEY=VALUE, or no key of a variant.
    """
    from quantkit.errors import RecipeError
    from quantkit.strict_yaml import parse_mapping

    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise RecipeError(f"--set {text} is not KEY=VALUE", "write --set double_quant=false, for one")
        if key in ("model", "out", "calibration", "observer"):
            raise RecipeError(f"--set {text}: '{key}' is not a key of a variant", "docs/recipe.md lists them")
        found |= parse_mapping(f"{key}: {value}", f"--set {text}")
    return found


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        _say(f"warning: {warning}", stderr=True)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=160)


def _say(text: str, stderr: bool = False) -> None:
    typer.echo(text, err=stderr)
