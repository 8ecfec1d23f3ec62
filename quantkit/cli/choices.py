"""Commands that tell what there is to choose from, and those for the environments of libraries."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.base import AsJson, TrustsCode, app, bits_given, console, say

if TYPE_CHECKING:
    from rich.table import Table

    from quantkit.isolation.environments import Environment

PANEL = "Choices"
SHOWN = ("torch", "transformers")
"""Packages whose versions are shown beside the library's."""
environments = typer.Typer(no_args_is_help=True, help="Environments of the field's libraries: install, list, remove.")
app.add_typer(environments, name="env", rich_help_panel=PANEL)


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
def models(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Part of an architecture's name; all by default.")] = "",
    as_json: AsJson = False,
) -> None:
    """Print what becomes of each architecture, as tests have found: what is quantized, and what loads it."""
    from quantkit.verification.models import chosen, models_table, read_models

    found = chosen(read_models(), name)
    _print(found, lambda: models_table(found), as_json)


@app.command(rich_help_panel=PANEL)
def estimate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A well-known name, a folder, or a hub id.")],
    method: Annotated[str | None, typer.Option(help="See 'quantkit methods'.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Kind of scheme.")] = None,
    bits: Annotated[str | None, typer.Option(help="Width of an integer code; auto mixes them to a budget.")] = None,
    budget: Annotated[str | None, typer.Option(help="With bits auto: bits per weight, or the file's size.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale; -1 is per channel.")] = None,
    format: Annotated[  # noqa: A002 - a recipe key
        str | None, typer.Option(help="See 'quantkit formats'.")
    ] = None,
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
    trust_remote_code: TrustsCode = False,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory that a model takes, from its config alone."""
    use = {"batch": batch, "context": context, "kv_dtype": kv_dtype, "lora_rank": lora_rank}
    use |= {"device": device, "overhead": overhead, "calibration_tokens": calibration_tokens}
    use["trust_remote_code"] = trust_remote_code
    if fits is not None or cards:
        _print_what_fits(model, use, fits, as_json)
        return
    import quantkit
    from quantkit.estimation.tables import estimate_table

    keys: dict[str, Any] = {
        key: value
        for key, value in {"bits": bits_given(bits), "budget": budget, "group_size": group_size}.items()
        if value is not None
    }
    found = quantkit.estimate(model, method=method, scheme=scheme, format=format, train=train, **{**use, **keys})
    _print(found.to_json(), lambda: estimate_table(found), as_json)


def _print_what_fits(model: str, use: dict[str, Any], memory: str | None, as_json: bool) -> None:
    """Print what fits so much memory, or where none is given, the usual cards."""
    from quantkit import estimation
    from quantkit.estimation.tables import cards_table, fits_table

    if memory is not None:
        ways = estimation.fits(model, memory, **use)
        _print([way.to_json() for way in ways], lambda: fits_table(ways), as_json)
    else:
        rows = estimation.cards(model, **use)
        _print([row.to_json() for row in rows], lambda: cards_table(rows), as_json)


@environments.command("install")
def install_environments(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Libraries; see 'quantkit methods'.")],
) -> None:
    """Install the environment of a library: its locked packages, each file checked by its hash."""
    from quantkit.cli.display import Display
    from quantkit.isolation.install import install
    from quantkit.libraries import LIBRARIES

    libraries = [LIBRARIES.get(name) for name in names]
    for library in libraries:
        with Display(console(stderr=True)) as display:
            found = install(library, display)
        say(f"{library.name}: ready in {found.folder}")


@environments.command("list")
def list_environments(as_json: AsJson = False) -> None:
    """List the environments with their states, versions and sizes."""
    from quantkit.isolation.environments import listed

    found = listed()
    _print([_environment_as_json(each) for each in found], lambda: _environments_table(found), as_json)


@environments.command("remove")
def remove_environments(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Libraries.")],
) -> None:
    """Remove all environments of a library. What uv keeps of them in its cache stays; see 'uv cache prune'."""
    from quantkit.errors import QuantkitError, did_you_mean
    from quantkit.isolation.environments import folders, remove
    from quantkit.system.names import chosen

    there = {name for name, _ in folders()}
    meant = []
    for name in names:
        found = chosen(name, there)
        if found is None:
            remedy = did_you_mean(name, there) if there else "none is installed"
            raise QuantkitError(f"there is no environment of '{name}'", remedy)
        meant.append(found)
    for name in meant:
        for folder in remove(name):
            say(f"removed {folder}")


def _environments_table(found: list[Environment]) -> Table:
    from rich.table import Table

    from quantkit.isolation.environments import cache_folder
    from quantkit.libraries import LIBRARIES

    table = Table(caption=f"in {cache_folder()}", caption_justify="left")
    for column in ("library", "state", "version", *SHOWN, "size", "folder"):
        table.add_column(column)
    for each in found:
        packages = each.facts.get("packages", {})
        known = each.library in LIBRARIES
        version = packages.get(LIBRARIES.get(each.library).distribution, "") if known else ""
        size = f"{each.facts['size_bytes'] / 2**30:.1f} GiB" if "size_bytes" in each.facts else ""
        state = f"{each.state}: {each.why}" if each.why else each.state
        shown = each.folder.name if each.folder.exists() else ""
        table.add_row(each.library, state, version, *(packages.get(name, "") for name in SHOWN), size, shown)
    return table


def _environment_as_json(each: Environment) -> dict[str, Any]:
    return {
        "library": each.library,
        "state": each.state,
        "why": each.why,
        "folder": str(each.folder) if each.folder.exists() else None,
        **each.facts,
    }


def _print(data: Any, table: Callable[[], Table], as_json: bool) -> None:
    if as_json:
        say(json.dumps(data, indent=2))
    else:
        console().print(table())
