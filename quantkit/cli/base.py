"""The application: what all commands share."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
ANYWHERE = ("-q", "--quiet", "-v", "--verbose")
"""Options of all commands, which may stand before and behind a command's name."""


@dataclass(slots=True)
class Voice:
    """How much a command says.

    Attributes:
        quiet: results, warnings and errors alone.
        verbose: what libraries log too, and tracebacks.
    """

    quiet: bool = False
    verbose: bool = False


VOICE = Voice()
"""Of the command that is running."""


class _Commands(TyperGroup):
    """The commands: a mistake of the user prints one line and exits with code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Options of all commands are read wherever they stand, up to ``--``."""
        end = args.index("--") if "--" in args else len(args)
        shared = [arg for arg in args[:end] if arg in ANYWHERE]
        return super().parse_args(ctx, [*shared, *(arg for arg in args[:end] if arg not in ANYWHERE), *args[end:]])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except QuantkitError as error:
            if VOICE.verbose:
                say("".join(traceback.format_exception(error)), stderr=True)
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
    context_settings={"help_option_names": ["-h", "--help"]},
)
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TrustsCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model: read it first.")
]
AllColumns = Annotated[
    bool, typer.Option("--all-columns", help="Every figure, in further tables where the terminal is too narrow.")
]


def names_in(package: str) -> Callable[[str], list[str]]:
    """What a shell is told may follow an option: the names of the registry of ``quantkit.PACKAGE`` that so begin."""

    def complete(incomplete: str) -> list[str]:
        from importlib import import_module

        registry = getattr(import_module(f"quantkit.{package}"), package.upper())
        return [name for name in registry.names() if name.startswith(incomplete)]

    return complete


def complete_method(incomplete: str) -> list[str]:
    """The methods that so begin, and behind a ``+`` what can come there: ``awq+gptq``, ``gptq+tune``."""
    from quantkit.methods import METHODS
    from quantkit.methods.tuning import TUNE
    from quantkit.recipe.steps import is_method

    head, plus, last = incomplete.rpartition("+")
    chains = [f"{head}{plus}{name}" for name in METHODS.names() if name.startswith(last)]
    tuned = [f"{head}+{TUNE}"] if head != "none" and is_method(head) and TUNE.startswith(last) else []
    return [*filter(is_method, chains), *tuned]


def _print_version(wanted: bool) -> None:
    if wanted:
        from quantkit.system.distribution import own_version

        say(f"quantkit {own_version()}")
        raise typer.Exit


class _Told(logging.Handler):
    """Prints what is logged on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.name}: {record.getMessage()}", stderr=True)


def _tell_logs() -> Callable[[], None]:
    """Print what libraries log, until what is returned is called."""
    root, handler = logging.getLogger(), _Told(logging.INFO)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)

    def end() -> None:
        root.removeHandler(handler)
        root.setLevel(level)

    return end


@app.callback()
def _options(
    ctx: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print results, warnings and errors alone; also behind a command.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print what libraries log, and tracebacks; also behind a command.")
    ] = False,
) -> None:
    """Quantize, export and compare large language models: one recipe, one calibration set, one report."""
    VOICE.quiet, VOICE.verbose = quiet, verbose
    if verbose:
        ctx.call_on_close(_tell_logs())


def warn(warnings: Iterable[str]) -> None:
    """Print warnings on standard error."""
    for warning in warnings:
        say(f"warning: {warning}", stderr=True)


def console(stderr: bool = False) -> Console:
    """A console for tables, as wide as the terminal; where there is none, as ``COLUMNS`` says, or 160 columns wide."""
    from rich.console import Console

    found = Console(stderr=stderr, quiet=stderr and VOICE.quiet)
    columns = os.environ.get("COLUMNS", "")
    wide = int(columns) if columns.isdigit() and int(columns) > 0 else 160
    return found if found.is_terminal else Console(stderr=stderr, width=wide, quiet=found.quiet)


def say(text: str, stderr: bool = False) -> None:
    """Print a line of the answer, or one about it on standard error."""
    typer.echo(text, err=stderr)


def bits_given(given: str | None) -> int | str | None:
    """A width, or what a recipe may say in its place, which is told when it is read."""
    return int(given) if given is not None and given.strip().lstrip("-").isdigit() else given
