"""The documentation keeps to the code: commands, recipes, keys, links and the list of files."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import shlex
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import typer.main
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import quantkit
from quantkit import recipe
from quantkit.cli import app
from quantkit.cli.catalogue import shown_bits
from quantkit.formats import FORMATS
from quantkit.gates import METRICS
from quantkit.methods import METHODS
from quantkit.methods.base import InputStatistics, Statistic
from quantkit.methods.tuning import TuneOptions
from quantkit.recipe import RecoverOptions
from quantkit.recipe.steps import steps_of
from quantkit.records import dataset_names, named_dataset
from quantkit.schemes import SCHEMES, Fp4Scheme, IntScheme, Mxfp4Scheme, Nf4Scheme
from quantkit.transforms import TRANSFORMS
from quantkit.transforms.base import ModelView
from tests import files_page

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SECTIONS: dict[str, type[BaseModel]] = {
    "Top level": recipe.Recipe,
    "model": recipe.ModelSpec,
    "merge": recipe.MergeSpec,
    "calibration": recipe.CalibrationSpec,
    "variants": recipe.VariantSpec,
    "quantization": recipe.QuantizationSpec,
    "evaluation": recipe.EvaluationSpec,
    "texts": recipe.TextSpec,
    "tasks": recipe.TaskSpec,
    "answers": recipe.AnswerSpec,
    "samples": recipe.SampleSpec,
    "report": recipe.ReportSpec,
    "budget": recipe.BudgetSpec,
    "tracking": recipe.TrackingSpec,
    "mlflow": recipe.MlflowSpec,
    "history": recipe.HistorySpec,
    "retention": recipe.RetentionSpec,
    "webhook": recipe.WebhookSpec,
}


def name_of(page: Path) -> str:
    """A page's path, for the names of tests."""
    return page.relative_to(ROOT).as_posix()


WHOLE = typer.main.get_command(app)
COMMANDS: dict[str, Any] = getattr(WHOLE, "commands")  # noqa: B009 - of click's Group
OPTIONS = {name for parameter in WHOLE.params for name in parameter.opts}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def section(name: str, heading: str) -> str:
    """The text between a heading and the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}$\n(.*?)(?=^#|\Z)", text_of(name), re.MULTILINE | re.DOTALL)
    assert found, f"{name} has no heading '{heading}'"
    return found[1]


def table(text: str) -> dict[str, list[str]]:
    """The rows of the first table of a text, by the code in their first cell."""
    rows = {}
    for line in text[text.index("\n|") + 1 :].split("\n\n")[0].strip().splitlines()[2:]:
        first, *rest = (cell.strip() for cell in line.strip("|").split(" | "))
        rows[first.strip(" `")] = rest
    return rows


def commands(page: Path) -> Iterator[list[str]]:
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            if line.startswith("quantkit "):
                yield shlex.split(re.sub(r" > \S+$", "", line), comments=True)[1:]


# Commands


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_one_that_the_command_line_understands(page: Path) -> None:
    for name, *arguments in commands(page):
        if name.startswith("-"):
            assert name in OPTIONS
        else:
            COMMANDS[name].make_context(name, list(arguments))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_running_text_exist(page: Path) -> None:
    for found in re.findall(r"`quantkit ([a-z-]+)[^`]*`", prose(page)):
        assert found in COMMANDS or found in OPTIONS


def test_the_readme_shows_every_command() -> None:
    assert {name for name, *_ in commands(ROOT / "README.md")} == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_in_commands_exist(page: Path) -> None:
    for argument in {argument for command in commands(page) for argument in command}:
        if argument.startswith("recipes/"):
            assert ROOT / argument in RECIPES


def test_every_make_target_in_the_documentation_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    named = {
        target
        for page in PAGES
        for target in re.findall(
            r"^make (?:\w+=\S+ )?([\w-]+)|`make (?:\w+=\S+ )?([\w-]+)[ `]", page.read_text("utf-8"), re.M
        )
    }
    assert {first or second for first, second in named} <= targets


# Links


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(linked), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {target}"


def test_the_picture_of_the_report_is_a_small_png() -> None:
    picture = (ROOT / "docs" / "images" / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 300_000


def test_the_picture_of_the_grids_has_every_level_and_needs_nothing_from_elsewhere() -> None:
    text = text_of("docs/images/grids.svg")
    assert len(text) < 50_000
    assert not re.search(r"href|url\(|@import|<script", text)
    panels = [each for each in ET.fromstring(text) if each.tag.endswith("}g")]
    drawn = {panel[0].text: sum(each.get("class") == "level" for each in panel) for panel in panels}
    tables = {"nf4": Nf4Scheme.table, "fp4": Fp4Scheme.table, "mxfp4": Mxfp4Scheme.table}
    assert drawn == {"int4": IntScheme(4).levels} | {name: len(set(table)) for name, table in tables.items()}


# Python and YAML


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_use_the_public_api(page: Path) -> None:
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "quantkit":
                assert node.attr in quantkit.__all__
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("quantkit."):
                check_call(node)


def check_call(node: ast.Call) -> None:
    function = getattr(quantkit, ast.unparse(node.func).removeprefix("quantkit."))
    inspect.signature(function).bind(*node.args, **{str(each.arg): each.value for each in node.keywords})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_in_the_documentation_are_valid(page: Path) -> None:
    shown = blocks(page, "yaml")
    for block in blocks(page, "python"):
        calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        shown += [str(ast.literal_eval(c.args[0])) for c in calls if ast.unparse(c.func) == "Recipe.parse"]
    for text in shown:
        assert recipe.Recipe.parse(text).variants


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert recipe.Recipe.load(path).name == path.stem


# What is said of keys, options, data sets and metrics


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_page_on_recipes_has_every_key_with_its_default(heading: str) -> None:
    shown, fields = table(section("docs/recipe.md", heading)), SECTIONS[heading].model_fields
    assert list(shown) == list(fields)
    for name, (_, default, _) in shown.items():
        assert_default(default, fields[name].get_default(call_default_factory=True))


def assert_default(shown: str, default: Any) -> None:
    if shown == "required":
        assert default is PydanticUndefined
    elif shown == "none":
        assert default is None
    elif shown == "empty":
        assert not default
    elif shown.startswith("see "):
        assert isinstance(default, BaseModel)
    elif shown != "`reports/NAME`":
        assert yaml.safe_load(shown.strip("`")) == plain(default)


def plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value.name if isinstance(value, recipe.TextSpec) else value


@pytest.mark.parametrize("method", METHODS.names())
def test_the_page_on_methods_has_every_option_with_its_default(method: str) -> None:
    shown, fields = table(section("docs/methods.md", method)), steps_of(method).Options.model_fields
    assert list(shown) == list(fields)
    for name, (_, default, _) in shown.items():
        assert_default(default, fields[name].default)


@pytest.mark.parametrize("name", TRANSFORMS.names())
def test_the_page_on_methods_has_every_option_of_a_transform_with_its_default(name: str) -> None:
    shown, fields = (
        table(section("docs/methods.md", f"The transform {name}")),
        TRANSFORMS.get(name).Options.model_fields,
    )
    assert list(shown) == list(fields)
    for option, (_, default, _) in shown.items():
        assert_default(default, fields[option].default)


def test_the_page_on_methods_has_every_option_of_tuning_with_its_default() -> None:
    shown, fields = table(section("docs/methods.md", "tune")), TuneOptions.model_fields
    assert list(shown) == list(fields)
    for name, (_, default, _) in shown.items():
        assert_default(default, fields[name].default)


def test_the_page_on_recovery_has_every_option_with_its_default() -> None:
    shown, fields = table(section("docs/recover.md", "Options")), RecoverOptions.model_fields
    assert list(shown) == list(fields)
    for name, (_, default, _) in shown.items():
        assert_default(default, fields[name].default)


def test_the_page_on_methods_has_every_scheme_with_its_bits() -> None:
    shown = table(section("docs/methods.md", "Schemes"))
    assert {kind: bits for kind, (bits, *_) in shown.items()} == {
        kind: f"{shown_bits(kind):.4g}" for kind in SCHEMES.names()
    }


def test_the_measured_variants_are_those_of_the_recipe() -> None:
    page = text_of("docs/methods.md")
    measured = page[page.index("<!-- measured: begin -->") : page.index("<!-- measured: end -->")]
    variants = recipe.Recipe.load(ROOT / "recipes" / "methods.yaml").own_variants
    shown = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", measured, re.MULTILINE)
    assert set(shown) == {(variant.name, variant.base_scheme().describe()) for variant in variants}


def test_the_page_on_calibration_has_every_data_set_with_its_licence() -> None:
    shown = table(section("docs/calibration.md", "Data sets"))
    assert list(shown) == dataset_names()
    assert {name: licence for name, (_, licence) in shown.items()} == {
        name: named_dataset(name).licence for name in dataset_names()
    }


def test_the_page_on_the_report_has_every_metric_of_a_gate() -> None:
    gates = section("docs/report.md", "Gates")
    for name, metric in METRICS.items():
        assert f"`{name}" in gates
        for field in metric.fields:
            assert f".{field}`" in gates


def test_every_format_is_named() -> None:
    for name in FORMATS.names():
        assert f"`{name}`" in text_of("docs/formats.md")
        assert f"`{name}`" in text_of("README.md")


# The list of files


def test_the_page_of_files_is_what_their_docstrings_say() -> None:
    assert files_page.PAGE.read_text(encoding="utf-8") == files_page.page(), "run python -m tests.files_page"


def test_the_readme_lists_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", text_of("README.md")))
    assert linked == {page.relative_to(ROOT).as_posix() for page in PAGES if page.parent.name == "docs"}


# Set-up files


def test_pre_commit_hooks_need_no_network() -> None:
    for repository in yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"]:
        assert repository["repo"] == "local"
        assert {hook["language"] for hook in repository["hooks"]} <= {"system", "pygrep", "fail"}


def test_the_changelog_names_the_version() -> None:
    """The version itself is that of a tag; what a copy without one is called has the coming one's number."""
    fallback = tomllib.loads(text_of("pyproject.toml"))["tool"]["hatch"]["version"]["fallback-version"]
    assert fallback.removesuffix(".dev0") in text_of("CHANGELOG.md")


# The example of a method


def test_the_transform_of_the_contributing_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    known = TRANSFORMS.names()
    monkeypatch.setattr(TRANSFORMS, "_entries", dict(TRANSFORMS._entries))
    module = ModuleType("example_of_a_transform")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(blocks(ROOT / "CONTRIBUTING.md", "python")[1], "CONTRIBUTING.md", "exec"), module.__dict__)
    (name,) = set(TRANSFORMS.names()) - set(known)
    variant = recipe.VariantSpec.model_validate({"name": "x", "transforms": [name], "method": "rtn", "ignore": []})
    (transform,) = variant.build_transforms()
    weights = {"model.norm.weight": torch.rand(4) + 1, "lm_head.weight": torch.randn(3, 4)}
    change = transform.of_model(cast(ModelView, SimpleNamespace(parameter=weights.__getitem__)))
    assert change is not None
    after = {f"{name}.weight": change.apply(name, "weight", weights[f"{name}.weight"]) for name in change.touches()}
    assert torch.allclose(after["model.norm.weight"], torch.ones(4))
    whole = weights["lm_head.weight"] * weights["model.norm.weight"]
    assert torch.allclose(after["lm_head.weight"] * after["model.norm.weight"], whole)


def test_the_method_of_the_contributing_page_works(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    known = METHODS.names()
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))
    module = ModuleType("example_of_a_method")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where pydantic looks up annotations
    exec(compile(blocks(ROOT / "CONTRIBUTING.md", "python")[0], "CONTRIBUTING.md", "exec"), module.__dict__)
    (name,) = set(METHODS.names()) - set(known)
    added = METHODS.get(name)
    assert recipe.VariantSpec(name="x", method=name, options={"candidates": 4}).method_options().model_dump() == {
        "candidates": 4
    }

    torch.manual_seed(0)
    inputs = torch.randn(512, 64) * torch.linspace(0.1, 3, 64)[torch.randperm(64)]
    weight, scheme = torch.randn(32, 64), IntScheme(3, 32)
    known_inputs = InputStatistics(512, square_mean=inputs.square().mean(0))
    assert added.needs == {Statistic.SQUARE_MEAN}

    def output_error(statistics: InputStatistics) -> float:
        solution = added(added.Options()).quantize(weight, statistics, scheme, torch.float16)
        assert torch.isfinite(solution.error).all()
        return float((inputs @ (weight - solution.weight.dequantize(torch.float32)).T).square().mean())

    assert output_error(known_inputs) < output_error(InputStatistics())


def test_no_module_takes_the_place_of_a_public_name() -> None:
    """Importing a submodule binds its name in the package, over a public function of that name."""
    modules = {module.name for module in pkgutil.iter_modules(quantkit.__path__)}
    assert modules.isdisjoint(quantkit.__all__)
