"""The site: what ``make site`` builds it from, without MkDocs, which lives in the extra ``docs``."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags are MkDocs' own."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: None)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)
    return found


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / "docs" / "site_hook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed(nav: Any) -> Iterator[str]:
    for each in nav.values() if isinstance(nav, dict) else nav:
        yield from [each] if isinstance(each, str) else listed(each)


def test_every_page_is_listed_once(config: dict[str, Any], hook: ModuleType) -> None:
    outside = {uri for uri in hook.OUTSIDE.values() if uri.endswith(".md")}
    assert sorted(listed(config["nav"])) == sorted(PAGES | outside | {hook.RECIPES}), "list it under nav in mkdocs.yml"


def test_what_the_site_takes_from_elsewhere_in_the_repository_is_there(hook: ModuleType) -> None:
    for source in hook.OUTSIDE:
        assert (ROOT / source).is_file()


def test_nothing_is_fetched_by_a_page(config: dict[str, Any], hook: ModuleType) -> None:
    assert config["theme"]["font"] is False
    assert {next(iter(each)) if isinstance(each, dict) else each for each in config["plugins"]} == {"search"}
    loads = '<script src="https://cdn.example/x.js"></script><a href="https://example.org">x</a><img src=a.png>'
    assert [found[1] or found[2] for found in hook.LOADED.finditer(loads)] == ["https://cdn.example/x.js", "a.png"]


LINKS = {
    "../SECURITY.md#reporting": "security.md#reporting",
    "../recipes/quickstart.yaml": "recipes.md#quickstart",
    "../README.md": "index.md",
    "recipe.md#texts": "recipe.md#texts",
    "#here": "#here",
    "https://example.org/README.md": "https://example.org/README.md",
}


@pytest.mark.parametrize("link", LINKS)
def test_links_out_of_docs_lead_to_pages(hook: ModuleType, link: str) -> None:
    assert hook.relinked(f"[a]({link})", "methods.md") == f"[a]({LINKS[link]})"
    assert hook.relinked(f"`[a]({link})`", "methods.md") == f"`[a]({link})`"


def test_links_of_pages_from_outside_lead_to_pages(hook: ModuleType) -> None:
    assert hook.relinked("[a](docs/recipe.md)", "contributing.md") == "[a](recipe.md)"
    assert (
        hook.relinked("[a](wikitext.yaml) [b](../docs/recipe.md)", "data.md")
        == "[a](data/wikitext.yaml) [b](recipe.md)"
    )
    assert hook.relinked("[a](../../SECURITY.md)", "zh/recipe.md") == "[a](../security.md)"
    assert hook.relinked("[a](../recipe.md)", "zh/recipe.md") == "[a](../recipe.md)"


def test_every_recipe_is_on_the_page_of_recipes(hook: ModuleType) -> None:
    text = hook.recipes_page()
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == sorted(
        path.stem for path in (ROOT / "recipes").glob("*.yaml")
    )
