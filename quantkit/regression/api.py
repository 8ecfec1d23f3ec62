"""The public functions about runs over time. Each is what a command of the command line does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError, did_you_mean
from quantkit.recipe import Recipe
from quantkit.system.progress import Logged, Observer

if TYPE_CHECKING:
    from quantkit.regression.document import Check
    from quantkit.run_history import History, RunRecord

STATES = ("ok", "failed", "error", "interrupted", "passed", "regressed", "unknown")
"""How a run can have ended, or a check have judged it."""
LATEST = "latest"


def check(
    recipe: Recipe | Mapping[str, Any] | str | Path, observer: Observer | None = None, *, install: bool = True
) -> Check:
    """Run a recipe and judge it beside the accepted run.

    Args:
        recipe: a recipe with gates, its keys and values, or the path of one.
        observer: is told what happens; the logger ``quantkit`` by default.
        install: make the environments of libraries that are not there.

    Returns:
        The content of ``check.json``; ``exit_code`` is 0 passed, 1 regressed, 2 cannot be told.

    Raises:
        QuantkitError: nothing could run, another process is at work in the recipe's folder, or the history cannot be
            read.
    """
    from quantkit.regression.check import check as check_recipe

    return check_recipe(Recipe.of(recipe), observer or Logged(), installs=install)


def accept(
    run: int | str,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    file: str | Path | None = None,
    name: str | None = None,
    variants: str | Sequence[str] = (),
) -> dict[str, Any]:
    """Make a run the reference that later checks of its recipe are compared with.

    Args:
        run: its number, or ``latest``.
        recipe: whose history it is; its name too, where ``run`` is ``latest``.
        file: the history; ``reports/history.sqlite`` by default.
        name: of the recipe, where ``run`` is ``latest`` and the history holds several.
        variants: accept these alone, and leave the others with the reference that they have; all by default.

    Returns:
        The run as JSON data; ``accepted`` names the variants whose reference it is now.

    Raises:
        QuantkitError: there is no such run or variant, the variant failed, or the history cannot be written.
    """
    from quantkit.run_history.terminal import to_json

    loaded = None if recipe is None else Recipe.of(recipe)
    found = _history(loaded, file)
    named = name if loaded is None else loaded.name
    number = found.latest(named) if run == LATEST else _number(run)
    return to_json(found.accept(number, [variants] if isinstance(variants, str) else variants))


def history(
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    *,
    file: str | Path | None = None,
    name: str | None = None,
    variant: str | None = None,
    status: str | None = None,
    since: str | None = None,
    last: int | None = None,
) -> list[dict[str, Any]]:
    """The recorded runs, oldest first.

    Args:
        recipe: whose runs, in its history.
        file: the history; ``reports/history.sqlite`` by default.
        name: of the recipe.
        variant: runs that have it.
        status: ``ok``, ``failed``, ``error`` or ``interrupted``, or a check's verdict: ``passed``, ``regressed`` or
            ``unknown``.
        since: ISO date or moment, UTC if it does not say.
        last: the newest so many.

    Raises:
        QuantkitError: the history cannot be read, or ``since`` is no date.
    """
    from quantkit.run_history.terminal import to_json

    found = recorded(recipe, file=file, name=name, variant=variant, status=status, since=since, last=last)
    return [to_json(record) for record in found]


def recorded(
    recipe: Recipe | Mapping[str, Any] | str | Path | None,
    *,
    file: str | Path | None,
    name: str | None,
    variant: str | None,
    status: str | None,
    since: str | None,
    last: int | None,
) -> list[RunRecord]:
    """The same as :func:`history`, as records."""
    from quantkit.run_history import Wanted

    loaded = None if recipe is None else Recipe.of(recipe)
    named = name if loaded is None else loaded.name
    if status is not None and status not in STATES:
        raise QuantkitError(f"no run has the state '{status}'", did_you_mean(status, STATES))
    wanted = Wanted(named, variant, status, None if since is None else _moment(since), last)
    return _history(loaded, file).runs(wanted)


def recorded_run(run: int | str, *, file: str | Path | None = None) -> RunRecord:
    """A run with all that is recorded of it; ``latest`` is the newest finished one.

    Raises:
        QuantkitError: there is no such run, or the history cannot be read.
    """
    found = _history(None, file)
    return found.run(found.latest() if run == LATEST else _number(run))


def _history(recipe: Recipe | None, file: str | Path | None) -> History:
    from quantkit.run_history import History
    from quantkit.run_history.store import DEFAULT_FILE

    if file is not None:
        return History(Path(file))
    return History(DEFAULT_FILE if recipe is None else recipe.history_file)


def _number(run: int | str) -> int:
    text = str(run)
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise QuantkitError(f"'{run}' is not the number of a run", f"name a number or '{LATEST}'")
    return int(text)


def _moment(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise QuantkitError(f"'{text}' is not a date", "write 2026-11-01, or 2026-11-01T06:00") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC).isoformat(timespec="microseconds")
