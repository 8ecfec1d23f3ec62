"""Recipes: run, several at once, planned, imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import RecipeError
from quantkit.recipe import Recipe
from quantkit.system.progress import Among, Logged, Observer


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    observer: Observer | None = None,
    *,
    install: bool = True,
    cluster: str | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Run a recipe: quantize every variant, score each exported file, write the report.

    Args:
        recipe: a recipe, its keys and values, or the path of its file.
        observer: is told what happens; the logger ``quantkit`` by default.
        install: make the environments of libraries that are not there.
        cluster: address of a Ray cluster whose nodes do the work, ``auto`` for the one of this machine.
        store: address of object storage that lies between nodes that share no folder, such as ``s3://bucket/runs``.

    Returns:
        The content of ``report.json``. ``status`` is ``failed`` if a variant or a gate failed.

    Raises:
        QuantkitError: nothing can run: the recipe, the model or the calibration set is unusable, or the environment of
            a library is not there and may not be made; the cluster or the store cannot be used.
    """
    from quantkit.pipeline.recorded import recorded_run

    found, watching = Recipe.of(recipe), observer or Logged()
    if cluster is None and store is None:
        return recorded_run(found, watching, installs=install)
    from quantkit.pipeline.cluster import joined_through

    with joined_through(cluster, store) as workers:
        return recorded_run(found, Among(watching), installs=install, workers=workers)


def run_all(
    recipes: Sequence[Recipe | Mapping[str, Any] | str | Path],
    observer: Observer | None = None,
    *,
    page: str | Path | None = None,
    install: bool = True,
    cluster: str | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Run several recipes, each as :func:`run` does, and write one page that lists them all.

    One that cannot run, or of which a variant fails, leaves the others alone.

    Args:
        recipes: of each the recipe, its keys and values, or the path of its file.
        observer: is told what happens; the logger ``quantkit`` by default.
        page: where the page goes, a file that ends in ``.html``; beside it lies the same as JSON. By default
            ``runs.html`` in the folder that holds all their folders.
        install: make the environments of libraries that are not there.
        cluster: see :func:`run`; the recipes then run at the same time.
        store: see :func:`run`.

    Returns:
        ``schema``, ``status`` (``failed`` if some run is not ``ok``) and ``runs``, each with ``name``, ``status``,
        ``error``, ``report``, ``recommended``, ``gates_missed`` and ``variants``.

    Raises:
        QuantkitError: a recipe is not valid, two of them have one folder, or the page cannot be written.
    """
    from quantkit.pipeline.several import run_several

    found, watching = loaded_recipes(recipes), observer or Logged()
    place = None if page is None else Path(page).expanduser()
    if cluster is None and store is None:
        return run_several(found, watching, page=place, installs=install)
    from quantkit.pipeline.cluster import joined_through

    with joined_through(cluster, store) as workers:
        return run_several(found, Among(watching), page=place, installs=install, workers=workers)


def loaded_recipes(given: Sequence[Recipe | Mapping[str, Any] | str | Path]) -> list[Recipe]:
    """Recipes from what people have of them.

    Raises:
        RecipeError: some are not valid, or there is none; all mistakes are told.
    """
    found, mistakes = [], []
    for each in given:
        try:
            found.append(Recipe.of(each))
        except RecipeError as error:
            mistakes += [error, *(other for other in error.others if isinstance(other, RecipeError))]
    if mistakes:
        raise RecipeError.together(mistakes)
    if not found:
        raise RecipeError("no recipe was given", "name at least one")
    return found


def plan(recipe: Recipe | Mapping[str, Any] | str | Path, *, rehearse: bool = False) -> dict[str, Any]:
    """What a run would do: stages with their state, and for each variant its layers and estimated bytes.

    The model is fetched or converted if it is not here yet; nothing else is written.

    Args:
        recipe: a recipe, its keys and values, or the path of its file.
        rehearse: run the blocks up to the largest one with one batch through everything, in a scratch folder, and tell
            what that took and what the whole run will take: ``rehearsal``, see
            :func:`quantkit.pipeline.rehearsal.rehearsed`.

    Raises:
        QuantkitError: the recipe or the model is unusable, or a variant does not suit the model.
    """
    from quantkit.pipeline.plan import forecast

    found = forecast(Recipe.of(recipe))
    if rehearse:
        from quantkit.pipeline.rehearsal import rehearsed

        found["rehearsal"] = rehearsed(Recipe.of(recipe), found, forecast)
    return found


def import_recipe(path: str | Path) -> str:
    """The text of a recipe that does what a LLaMA-Factory export configuration asks for.

    Args:
        path: its YAML or JSON file.

    Raises:
        QuantkitError: the file cannot be read, is no export configuration, or asks for what quantkit refuses.
    """
    from quantkit.recipe.llamafactory import import_recipe as imported

    return imported(path)
