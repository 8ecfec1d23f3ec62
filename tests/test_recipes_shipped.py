from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.formats import FORMATS
from quantkit.libraries import LIBRARIES
from quantkit.recipe import Recipe
from quantkit.recipe.steps import is_method
from quantkit.records.named import FOLDER

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_named_for_its_file(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.name == path.stem
    assert recipe.folder == Path("reports") / path.stem
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_names_what_is_there(path: Path) -> None:
    recipe = Recipe.load(path)
    named = {file.stem for file in FOLDER.glob("*.yaml")}
    assert recipe.calibration.dataset in named or recipe.calibration.dataset.startswith(("hub:", "./"))
    for variant in recipe.own_variants:
        assert is_method(variant.method)
        assert variant.format in FORMATS.names()
    for each in recipe.library_variants:
        assert each.library in LIBRARIES
        assert each.stores() in (None, *FORMATS.names())
