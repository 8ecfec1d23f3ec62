"""Commands that tell what there is to choose from."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.base import AsJson, app, console, say

if TYPE_CHECKING:
    from rich.table import Table

PANEL = "Choices"


@app.command(rich_help_panel=PANEL)
def methods() -> None:
    """List the methods with their options, and the schemes."""
    from quantkit.cli.tables import method_lines

    for line in method_lines():
        say(line)


@app.command(rich_help_panel=PANEL)
def formats() -> None:
    """List the formats: which schemes each stores, and who loads it."""
    from quantkit.cli.tables import format_lines

    for line in format_lines():
        say(line)


@app.command(rich_help_panel=PANEL)
def runtimes() -> None:
    """List the runtimes: what each loads, and whether it can be used here."""
    from quantkit.cli.tables import runtime_lines

    for line in runtime_lines():
        say(line)


@app.command(rich_help_panel=PANEL)
def matrix(
    as_json: AsJson = False,
) -> None:
    """Print which methods, formats and runtimes go together, as tests have found."""
    from quantkit.verification.matrix import matrix_table, read_matrix

    found = read_matrix()
    _print(found, lambda: matrix_table(found), as_json)


@app.command(rich_help_panel=PANEL)
def estimate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A well-known name, a folder, or a hub id.")],
    method: Annotated[str, typer.Option(help="See 'quantkit methods'.")] = "gptq",
    scheme: Annotated[str, typer.Option(help="Kind of scheme.")] = "int",
    bits: Annotated[int | None, typer.Option(help="Width of an integer code.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale; -1 is per channel.")] = None,
    format: Annotated[  # noqa: A002 - a recipe key
        str, typer.Option(help="See 'quantkit formats'.")
    ] = "compressed-tensors",
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    kv_dtype: Annotated[str | None, typer.Option(help="Of the KV cache; that of the activations by default.")] = None,
    lora_rank: Annotated[int, typer.Option(help="Of the adapters in training.")] = 16,
    train: Annotated[bool, typer.Option("--train", help="QLoRA training too.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    overhead: Annotated[
        str | None, typer.Option(help="What CUDA takes for itself: 600MiB by default, a round number to be adjusted.")
    ] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="That the model is quantized with.")] = None,
    fits: Annotated[str | None, typer.Option(metavar="MEMORY", help="What fits so much memory, such as 8GiB.")] = None,
    cards: Annotated[bool, typer.Option("--cards", help="What fits the usual cards.")] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory that a model takes, from its config alone."""
    use = {"batch": batch, "context": context, "kv_dtype": kv_dtype, "lora_rank": lora_rank}
    use |= {"device": device, "overhead": overhead, "calibration_tokens": calibration_tokens}
    if fits is not None or cards:
        _print_what_fits(model, use, fits, as_json)
        return
    import quantkit
    from quantkit.estimation.tables import estimate_table

    keys: dict[str, Any] = {
        key: value for key, value in {"bits": bits, "group_size": group_size}.items() if value is not None
    }
    found = quantkit.estimate(model, method=method, scheme=scheme, format=format, train=train, **{**use, **keys})
    _print(found.to_json(), lambda: estimate_table(found), as_json)


def _print_what_fits(model: str, use: dict[str, Any], memory: str | None, as_json: bool) -> None:
    """What fits so much memory, or where none is given, the usual cards."""
    from quantkit import estimation
    from quantkit.estimation.tables import cards_table, fits_table

    if memory is not None:
        ways = estimation.fits(model, memory, **use)
        _print([way.to_json() for way in ways], lambda: fits_table(ways), as_json)
    else:
        rows = estimation.cards(model, **use)
        _print([row.to_json() for row in rows], lambda: cards_table(rows), as_json)


def _print(data: Any, table: Callable[[], Table], as_json: bool) -> None:
    if as_json:
        say(json.dumps(data, indent=2))
    else:
        console().print(table())
