"""Who is told how a check ended beside the one who ran it: a GitHub job's summary, a webhook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from quantkit.errors import QuantkitError
from quantkit.recipe import Recipe
from quantkit.regression import webhook
from quantkit.regression.document import Check
from quantkit.regression.pages.files import append_step_summary
from quantkit.system.progress import Observer


def tell(recipe: Recipe, check: Check, observer: Observer) -> Check:
    """Tell whom the recipe and the environment name.

    Nobody's deafness changes a verdict: what could not be told is a note of the check that is returned.
    """
    notes = [
        note
        for note in (
            _attempted(observer, lambda: append_step_summary(check)),
            _attempted(observer, lambda: _post(recipe, check)),
        )
        if note is not None
    ]
    return replace(check, notes=(*check.notes, *notes)) if notes else check


def _post(recipe: Recipe, check: Check) -> None:
    if recipe.webhook is not None and webhook.wanted(recipe.webhook, check):
        webhook.post(webhook.target(recipe.webhook), webhook.payload(check))


def _attempted(observer: Observer, work: Callable[[], object]) -> str | None:
    try:
        work()
    except QuantkitError as error:
        observer.note(f"warning: {error}")
        return str(error)
    return None
