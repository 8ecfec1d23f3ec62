"""The application: what all commands share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from quantkit.errors import EXIT_USER_ERROR, QuantkitError
from quantkit.system.os_errors import as_quantkit_error
from quantkit.system.shutdown import EXIT_TERMINATED, Terminated

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


class _Commands(TyperGroup):
    """The commands: a mistake of the user prints one line and exits with code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except QuantkitError as error:
            for each in (error, *error.others):
                say(f"error: {each}", stderr=True)
            raise typer.Exit(EXIT_USER_ERROR) from error
        except OSError as error:
            refusal = as_quantkit_error(error)
            if refusal is None:
                raise
            say(f"error: {refusal}", stderr=True)
            raise typer.Exit(EXIT_USER_ERROR) from error
        except KeyboardInterrupt as error:
            say("interrupted: what is finished is kept, the same command goes on from there", stderr=True)
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except Terminated as error:
            say("stopped: what is finished is kept, the same command goes on from there", stderr=True)
            raise typer.Exit(EXIT_TERMINATED) from error


app = typer.Typer(
    cls=_Commands,
    name="quantkit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TrustsCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model: read it first.")
]
AllColumns = Annotated[
    bool, typer.Option("--all-columns", help="Every figure, in further tables where the terminal is too narrow.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from quantkit.system.distribution import own_version

        say(f"quantkit {own_version()}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize, export and compare large language models: one recipe, one calibration set, one report."""


def warn(warnings: Iterable[str]) -> None:
    """Print warnings on standard error."""
    for warning in warnings:
        say(f"warning: {warning}", stderr=True)


def console(stderr: bool = False) -> Console:
    """A console for tables, as wide as the terminal; where there is none, as ``COLUMNS`` says, or 160 columns wide."""
    from rich.console import Console

    found = Console(stderr=stderr)
    columns = os.environ.get("COLUMNS", "")
    wide = int(columns) if columns.isdigit() and int(columns) > 0 else 160
    return found if found.is_terminal else Console(stderr=stderr, width=wide)


def say(text: str, stderr: bool = False) -> None:
    """Print a line of the answer, or one about it on standard error."""
    typer.echo(text, err=stderr)
