"""Several recipes in one call: each with its own report, and one page that lists them all."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import combinations
from pathlib import Path
from threading import Lock
from typing import Any

from quantkit.errors import QuantkitError, RecipeError
from quantkit.pipeline.context import NO_MEMORY
from quantkit.pipeline.recorded import recorded_run
from quantkit.pipeline.workers import HERE, Workers
from quantkit.recipe import Recipe
from quantkit.report.runs_page import SUMMARY, check_page, run_entry, write_runs
from quantkit.system.artifacts import write_text
from quantkit.system.os_errors import cpu_ran_out
from quantkit.system.progress import Named, Observer
from quantkit.system.redaction import redacted

PAGE = "runs.html"


def page_of(recipes: Sequence[Recipe]) -> Path:
    """Where the page of several runs lies if nobody names another place: in the folder that holds all of theirs."""
    folders = [recipe.folder.parent.absolute() for recipe in recipes]
    return Path(os.path.relpath(os.path.commonpath(folders))) / PAGE


def run_several(
    recipes: Sequence[Recipe],
    observer: Observer,
    *,
    page: Path | None = None,
    installs: bool = True,
    workers: Workers = HERE,
) -> dict[str, Any]:
    """Run recipes, one after another or all at a time; one that cannot run leaves the others alone.

    The page is written anew whenever a run has ended, so that it has what there is.

    Args:
        recipes: at least one.
        observer: is told what happens, with the name of the run.
        page: a file that ends in ``.html``; see :func:`page_of`.
        installs: make the environments of libraries that are not there.
        workers: who does what takes long.

    Returns:
        What the page's JSON holds, see :func:`quantkit.report.runs_page.write_runs`.

    Raises:
        RecipeError: two of them would write over each other, or the page over one; its name ends in something else.
        OutputError: the page cannot be written, or another file lies there.
    """
    place = page_of(recipes) if page is None else page
    check_several(recipes, place)
    check_page(place)
    entries: dict[str, dict[str, Any]] = {}
    writing = Lock()

    def written() -> dict[str, Any]:
        told = [entries[str(each.folder)] for each in recipes if str(each.folder) in entries]
        found = write_runs(told, place)
        workers.keep((place, place.with_suffix(SUMMARY)))
        return found

    def run_one(number: int, recipe: Recipe) -> None:
        observer.note(f"run {number} of {len(recipes)}: {recipe.name}")
        entry = _entry(recipe, Named(observer, recipe.name), installs, workers)
        with writing:
            entries[str(recipe.folder)] = entry
            written()

    workers.each([partial(run_one, number, recipe) for number, recipe in enumerate(recipes, 1)])
    return written()


def check_several(recipes: Sequence[Recipe], page: Path) -> None:
    """Refuse recipes that would write over each other, and a page that is no page."""
    folders = [Path(os.path.realpath(recipe.folder)) for recipe in recipes]
    for one, other in combinations(folders, 2):
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise RecipeError(f"several recipes write to {one}", "give each a name or a report.folder of its own")
    if page.suffix != ".html":
        raise RecipeError(f"{page}: the page of several runs is HTML", "give a name that ends in .html")
    if Path(os.path.realpath(page.parent)) in folders:
        raise RecipeError(f"{page} lies in the folder of a run, which has files of its own", "name one outside of it")


def _entry(recipe: Recipe, observer: Observer, installs: bool, workers: Workers) -> dict[str, Any]:
    """Run a recipe; what the page says of it."""
    started = time.monotonic()
    content, failure = None, None
    try:
        content = recorded_run(recipe, observer, installs=installs, workers=workers)
    except QuantkitError as error:
        failure = "; ".join(str(each) for each in (error, *error.others))
    except Exception as error:  # a model's code may raise anything, and forty other recipes wait
        failure = NO_MEMORY if cpu_ran_out(error) else _unexpected(recipe, error)
    if failure is not None:
        observer.note(f"did not run: {failure}")
    return run_entry(recipe.name, recipe.folder, time.monotonic() - started, content, failure)


def _unexpected(recipe: Recipe, error: Exception) -> str:
    """What is said of an error that is a bug, whose traceback is kept."""
    file, told = recipe.folder / "logs" / "traceback.log", redacted("".join(traceback.format_exception(error)))
    where = "unexpected"
    with suppress(QuantkitError):  # the folder may be what cannot be written
        write_text(file, told)
        where = f"unexpected: the traceback is in {file}"
    return f"{type(error).__name__}: {redacted(str(error))} ({where})"
