from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.errors import OutputError, RecipeError
from quantkit.evaluation import stage as scores
from quantkit.pipeline import several
from quantkit.recipe import Recipe
from quantkit.recipe.outputs import ReportSpec
from quantkit.report.runs_page import run_entry, write_runs
from quantkit.system.progress import Silent
from tests.runs import recipe_data, score_here, write_recipe

LOOSE = {"evaluation": {"texts": ["prose"], "context_length": 32, "max_tokens": 64, "metrics": ["perplexity"]}}


@pytest.fixture(scope="module")
def recipes(model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One that ends well, one of a model that is not there, and one with a variant that fails."""
    folder = tmp_path_factory.mktemp("several")
    found = []
    for name, group, source in (("first", 32, model), ("second", 32, folder / "absent"), ("third", 128, model)):
        variants: list[dict[str, Any]] = [{"name": f"rtn-{name}", "method": "rtn", "group_size": group}]
        data = recipe_data(model, records, folder / "out" / name, variants, **LOOSE)
        data |= {"name": name, "model": {"source": str(source)}}
        found.append(write_recipe(folder / f"{name}.yaml", data))
    return found


def test_each_recipe_has_its_report_and_one_page_lists_them_all(
    recipes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "run_job", score_here)
    out = recipes[0].parent / "out"
    result = CliRunner().invoke(app, ["run", *map(str, recipes)])
    assert result.exit_code == 1, result.output
    lines = result.stdout.splitlines()
    assert lines, result.output
    assert lines[0] == "first: ok, recommended rtn-first"
    assert lines[1].startswith("second: error, ")
    assert "absent" in lines[1]
    assert lines[2].startswith("third: failed, ")
    assert "first: baseline" in result.stderr  # of which run a stage is
    data = json.loads((out / "runs.json").read_text())
    assert [each["status"] for each in data["runs"]] == ["ok", "error", "failed"]
    assert data["runs"][0]["variants"][0]["size_bytes"] > 0
    page = (out / "runs.html").read_text()
    for link in re.findall(r'href="([^d][^"]+)"', page):
        assert (out / link).is_file(), link
    assert 'href="first/report.html"' in page
    assert 'href="third/report.html"' in page
    assert "of the block weights would stay float" in page  # why the variant of the third failed


def test_mistakes_of_all_recipes_are_told_before_any_work(recipes: list[Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nmodel: m\n")
    with pytest.raises(RecipeError) as caught:
        quantkit.run_all([tmp_path / "a.yaml", recipes[0], tmp_path / "b.yaml"], Silent())
    told = [str(each) for each in (caught.value, *caught.value.others)]
    assert "a.yaml" in told[0]
    assert "b.yaml" in told[1]


def test_recipes_that_would_write_over_each_other_are_refused(recipes: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"several recipes write to .*first"):
        quantkit.run_all([recipes[0], recipes[0]], Silent(), page=tmp_path / "p.html")
    with pytest.raises(RecipeError, match=r"ends in \.html"):
        quantkit.run_all([recipes[0], recipes[1]], Silent(), page=tmp_path / "p.md")
    with pytest.raises(RecipeError, match="no recipe was given"):
        quantkit.run_all([])
    inside = Recipe.load(recipes[1]).model_copy(update={"report": ReportSpec(folder=str(recipes[0].parent / "out"))})
    with pytest.raises(RecipeError, match=r"several recipes write to .*out"):
        quantkit.run_all([recipes[0], inside], Silent(), page=tmp_path / "p.html")
    with pytest.raises(RecipeError, match="lies in the folder of a run"):
        quantkit.run_all([recipes[0], recipes[1]], Silent(), page=recipes[0].parent / "out/first/report.html")


def test_a_file_that_is_no_page_is_left_alone_and_a_page_until_a_run_has_ended(
    recipes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(several, "recorded_run", stopped)
    for name in ("index.html", "index.json"):
        (tmp_path / name).write_text("[]")
        with pytest.raises(OutputError, match=f"{name} exists and is no page of several runs"):
            quantkit.run_all(recipes[:2], Silent(), page=tmp_path / "index.html")
        (tmp_path / name).unlink()
    write_runs([run_entry("earlier", tmp_path, 1.0, None, "why")], tmp_path / "index.html")
    before = (tmp_path / "index.html").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        quantkit.run_all(recipes[:2], Silent(), page=tmp_path / "index.html")
    assert (tmp_path / "index.html").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index.html", "index.json"]


def test_the_traceback_of_what_nobody_expected_is_kept(
    recipes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("of a model's code")

    monkeypatch.setattr(several, "recorded_run", broken)
    found = quantkit.run_all(recipes[:1], Silent(), page=tmp_path / "p.html")
    log = recipes[0].parent / "out/first/logs/traceback.log"
    assert found["runs"][0]["error"].endswith(f"(unexpected: the traceback is in {log})")
    assert "in broken" in log.read_text()
