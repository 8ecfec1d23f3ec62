"""Commands for the environments of libraries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.base import AsJson, app, console, say

if TYPE_CHECKING:
    from rich.table import Table

    from quantkit.isolation.environments import Environment

PANEL = "Choices"
SHOWN = ("torch", "transformers")
"""Packages whose versions are shown beside the library's."""
commands = typer.Typer(no_args_is_help=True, help="Environments of the field's libraries: install, list, remove.")
app.add_typer(commands, name="env", rich_help_panel=PANEL)


@commands.command("install")
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


@commands.command("list")
def list_environments(as_json: AsJson = False) -> None:
    """List the environments with their states, versions and sizes."""
    from quantkit.isolation.environments import listed

    found = listed()
    if as_json:
        say(json.dumps([_as_json(each) for each in found], indent=2))
    else:
        console().print(_table(found))


@commands.command("remove")
def remove_environments(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Libraries.")],
) -> None:
    """Remove all environments of a library. What uv keeps of them in its cache stays; see 'uv cache prune'."""
    from quantkit.errors import QuantkitError, did_you_mean
    from quantkit.isolation.environments import folders, remove

    there = {name for name, _ in folders()}
    for name in names:
        if name not in there:
            remedy = did_you_mean(name, there) if there else "none is installed"
            raise QuantkitError(f"there is no environment of '{name}'", remedy)
    for name in names:
        for folder in remove(name):
            say(f"removed {folder}")


def _table(found: list[Environment]) -> Table:
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


def _as_json(each: Environment) -> dict[str, Any]:
    return {
        "library": each.library,
        "state": each.state,
        "why": each.why,
        "folder": str(each.folder) if each.folder.exists() else None,
        **each.facts,
    }
