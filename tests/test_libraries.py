"""Variants that libraries quantize, beside our own: recipes, runs, reports, and plugins of other packages."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml

import quantkit
from quantkit.cli.tables import method_lines, plan_table
from quantkit.errors import EvaluationError, QuantkitError, RecipeError
from quantkit.evaluation import EvaluationJob
from quantkit.exports.manifest import is_whole
from quantkit.isolation.stage import option_notes
from quantkit.libraries import LIBRARIES, Libraries, Library
from quantkit.libraries.base import Offer, Request, Used
from quantkit.publishing import CARD, card
from quantkit.recipe import LibrarySpec, Recipe, VariantSpec
from quantkit.report import rounding_lines
from quantkit.system.artifacts import read_json
from quantkit.system.validation import parse_section
from tests.faulty_library import Faulty
from tests.runs import Notebook, hidden_names, make_recipe, recipe_data, score_here

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "plugins.md"
WORKING = {"library": "faulty", "env": "current", "limits": {"time": "60s"}}


@pytest.fixture(autouse=True)
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    LIBRARIES.names()
    monkeypatch.setattr(LIBRARIES, "_entries", {**LIBRARIES._entries, "faulty": Faulty})


def recipe(*variants: dict[str, Any], **changes: Any) -> Recipe:
    data = {"name": "demo", "model": {"source": "folder"}, "variants": list(variants), **changes}
    return Recipe.parse(yaml.safe_dump(data), "demo.yaml")


def library_variant(**keys: Any) -> LibrarySpec:
    (variant,) = recipe({"name": "v", "library": "faulty", **keys}).library_variants
    return variant


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "library": ({"library": "fualty"}, "unknown library 'fualty' (did you mean 'faulty'?"),
    "method": ({"method": "wroks"}, "library faulty has no method 'wroks' (did you mean 'works'?"),
    "key": ({"bitz": 4}, "unknown key 'variants[0].bitz' (did you mean 'bits'?"),
    "option": ({"options": {"sped": 1.0}}, "has no option 'sped' (did you mean 'speed'?"),
    "type of an option": ({"speed": "high"}, "option speed of faulty works is no float: 'high'"),
    "flag for a number": ({"speed": True}, "option speed of faulty works is no float: True"),
    "bits": ({"bits": 5}, "faulty works has no codes of 5 bits (it has 4, 8)"),
    "symmetric": ({"symmetric": False}, "faulty works is symmetric only"),
    "group size": ({"group_size": -3}, "group_size -3 is not positive"),
    "format": ({"format": "gtpq"}, "unknown format 'gtpq' (did you mean 'gptq'?"),
    "foreign format": ({"method": "writes_packed", "format": "gptq"}, "writes compressed-tensors files"),
    "scored only": ({"method": "only_scored"}, "cannot quantize here: its kernels need a compiler for CUDA"),
    "time": ({"limits": {"time": "2 moons"}}, "variants[0].limits.time: '2 moons' is no length of time"),
    "memory": ({"limits": {"memory": "much"}}, "variants[0].limits.memory: 'much' is not a size"),
    "limit": ({"limits": {"tiem": "2h"}}, "unknown key 'variants[0].limits.tiem' (did you mean 'time'?"),
    "environment": ({"env": "conda"}, "'conda' is not allowed"),
    "pattern": ({"ignore": ["("]}, "'(' is not a regular expression"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_one_line_before_anything_runs(mistake: str) -> None:
    keys, words = REFUSED[mistake]
    with pytest.raises(RecipeError) as caught:
        library_variant(**{"method": "works", **keys})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_left_out_is_the_librarys_own() -> None:
    found = library_variant(method="works").resolved()
    assert (found["bits"], found["group_size"], found["symmetric"]) == (4, 64, True)
    assert found["options"] == {"speed": 1.5, "fast": True}
    assert library_variant(speed=3).all_options() == {"speed": 3, "fast": True}


def test_a_row_says_which_options_are_not_the_librarys_own() -> None:
    own = "faulty works ran with the library's own options"
    assert option_notes(library_variant(method="works", fast=True)) == [own]
    assert option_notes(library_variant(method="works", speed=3)) == [f"{own} but for speed 3"]
    assert option_notes(library_variant(method="needs_cuda")) == []
    two = parse_section(LibrarySpec, {"name": "v", "library": "autoround", "bits": 2, "lr": 0.1}, "v")
    assert option_notes(two) == ["autoround ran with the library's own options but for lr 0.1"]
    assert (two.all_options()["iters"], two.all_options()["enable_alg_ext"]) == (1000, True)


def test_defaults_go_where_there_is_a_choice() -> None:
    defaults = {"bits": 8, "group_size": 32, "method": "rtn", "speed": 2.0, "range": "search", "format": "gptq"}
    given = recipe(
        {"name": "own"},
        {"name": "codes", "library": "faulty", "method": "works"},
        {"name": "fixed", "library": "faulty", "method": "needs_cuda"},
        {"name": "file", "library": "faulty", "method": "writes_packed"},
        defaults=defaults,
    )
    (own,), (codes, fixed, file) = given.own_variants, given.library_variants
    assert isinstance(own, VariantSpec)
    assert (own.method, own.bits, own.options) == ("rtn", 8, {"range": "search"})
    assert (codes.width, codes.group, codes.format, codes.all_options()["speed"]) == (8, 32, "gptq", 2.0)
    assert (fixed.bits, fixed.options) == (None, {})
    assert file.format is None


def test_a_recipe_with_libraries_survives_being_written() -> None:
    given = recipe({"name": "a", **WORKING, "method": "works", "speed": 2.0}, {"name": "b", "method": "rtn"})
    assert Recipe.parse(given.to_yaml()).variants == given.variants
    assert [each["method"] for each in given.resolved()["variants"]] == ["works", "rtn"]


def test_limits_are_told_in_units() -> None:
    limits = library_variant(limits={"time": "1.5h", "memory": "12GiB"}).limits
    assert (limits.seconds, limits.memory_bytes) == (5400, 12 << 30)
    assert library_variant().limits.memory_bytes is None


def in_float(model: Path, *args: Any) -> Recipe:
    """A recipe that keeps the floats of its model, which the library of these tests reads without torch."""
    data = recipe_data(model, *args)
    data["model"]["dtype"] = "own"
    return Recipe.parse(yaml.safe_dump(data))


ROWS: list[dict[str, Any]] = [
    {"name": "broken", **WORKING, "method": "raises"},
    {"name": "ours", "method": "rtn", "range": "minmax"},
    {"name": "theirs", **WORKING, "method": "works"},
    {"name": "hangs", **WORKING, "method": "sleeps", "limits": {"time": "1s"}},
    {"name": "half", **WORKING, "method": "writes_half"},
    {"name": "cuda", **WORKING, "method": "needs_cuda"},
    {"name": "drops", **WORKING, "method": "drops_rows", "format": "gptq"},
    {"name": "poor", **WORKING, "method": "rounds_badly"},
]


def test_a_sweep_goes_on_past_libraries_that_fail(
    float_model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.evaluation.stage.run_job", score_here)
    given = in_float(float_model, records, tmp_path / "run", json.loads(json.dumps(ROWS)))
    result = quantkit.run(given, Notebook())
    rows = {row["name"]: row for row in result["variants"]}
    assert list(rows) == [variant["name"] for variant in ROWS]
    failed = {name: row["worker"]["ending"] for name, row in rows.items() if "worker" in row}
    assert failed == {"broken": "error", "hangs": "time limit", "half": "bad output"}
    assert "quantizes on cuda alone" in rows["cuda"]["error"]
    assert {name for name, row in rows.items() if row["status"] == "ok"} == {"ours", "theirs", "drops", "poor"}
    # the same rounding on the same grid: the same figures to the last bit
    assert rows["theirs"]["metrics"] == rows["ours"]["metrics"]
    assert rows["theirs"]["bits_per_weight"] == rows["ours"]["bits_per_weight"]
    assert rows["theirs"]["method"] == "faulty works"
    assert rows["theirs"]["scheme"] == rows["ours"]["scheme"]
    assert rows["drops"]["library"]["calibration"]["used"]["samples"] == 11
    assert hidden_names(tmp_path / "run") == []
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "faulty works" in page
    assert "of 12 calibration rows with 576 tokens the library ran 11" in page
    assert "11 of 12 rows" in page
    assert "quantize-hangs.log" in page
    (told,) = (line for line in page.splitlines() if "worse than plain rounding" in line)
    assert re.search(r"KL divergence \S+ ± \S+ on prose, where ours has", told)
    assert [line.split(": ")[1] for line in rounding_lines(result)] == ["poor"]
    assert "quantkit's environment" in page
    _assert_is_like_any_other(tmp_path / "run" / "variants" / "theirs")
    _assert_is_reused(given)


def _assert_is_like_any_other(checkpoint: Path) -> None:
    assert is_whole(checkpoint)
    manifest = read_json(checkpoint / "manifest.json")
    assert manifest["created_by"].startswith("faulty ")
    assert manifest["variables"]["FAULTY_CORES"]
    text = card(checkpoint)
    assert "faulty" in text
    assert "works" in text
    converted = checkpoint.parent / "converted"
    assert quantkit.convert(checkpoint, "gptq", out=converted)["layers"] == 14
    assert quantkit.inspect(checkpoint)["problems"] == []


def _assert_is_reused(given: Recipe) -> None:
    notes = Notebook()
    plan = {each["name"]: each for each in quantkit.plan(given)["variants"]}
    assert plan["theirs"]["state"].startswith("finished")
    assert plan["broken"]["state"] == "to do, in this environment"
    assert plan["cuda"]["state"].startswith("cannot run: faulty needs_cuda quantizes on cuda alone")
    assert plan["theirs"]["size_bytes"] == pytest.approx(plan["ours"]["size_bytes"], rel=0.05)  # headers
    assert plan_table(quantkit.plan(given)).row_count == len(ROWS) + 2
    quantkit.run(given, notes)
    assert {"theirs: reused the finished checkpoint", "ours: reused the finished checkpoint"} <= set(notes.notes)


def test_a_checkpoint_of_a_library_that_cannot_be_scored_has_a_card(
    float_model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(job: EvaluationJob, **options: Any) -> dict[str, Any]:
        if job.checkpoint.name == "theirs":
            raise EvaluationError("no runtime loads it")
        return score_here(job, **options)

    monkeypatch.setattr("quantkit.evaluation.stage.run_job", score)
    given = in_float(float_model, records, tmp_path / "run", [{"name": "theirs", **WORKING, "method": "works"}])
    (row,) = quantkit.run(given, Notebook())["variants"]
    assert row["error"] == "no runtime loads it"
    assert "Not measured." in (tmp_path / "run" / "variants" / "theirs" / CARD).read_text(encoding="utf-8")


class Apart(Faulty):
    """A library with an environment of its own, whose lock lies in a folder of the test."""

    name = "apart"


def test_a_run_that_may_not_install_is_refused_in_one_line(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "apart.lock"
    lock.write_text("# download: 3000000000 bytes for 2 packages\none==1.0 \\\n    --hash=sha256:00\ntwo==2.0\n")
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("quantkit.isolation.lockfile.lock_path", lambda library: lock)
    monkeypatch.setattr(LIBRARIES, "_entries", {**LIBRARIES._entries, "apart": Apart})
    given = make_recipe(model, records, tmp_path / "run", [{"name": "v", "library": "apart", "method": "works"}])
    with pytest.raises(QuantkitError) as caught:
        quantkit.run(given, install=False)
    assert str(caught.value).startswith("not installed: apart")
    assert "2 packages, 2.79 GiB to fetch at most" in str(caught.value)
    assert "quantkit env install apart" in str(caught.value)
    (plan,) = quantkit.plan(given)["variants"]
    assert plan["state"] == "to do; its environment will be installed"


def test_every_library_that_ships_is_listed_with_what_it_does() -> None:
    assert LIBRARIES.broken() == {}
    text = "\n".join(method_lines())
    for library in LIBRARIES:
        assert f"{library.name}: {library.summary}" in text
        assert issubclass(library, Library)
        assert library.offers
        for offer in library.offers:
            assert all(isinstance(key, str) for key in offer.options)


class Nameless(Library):
    summary = "has no name"
    offers = (Offer("rtn", (4,), "gptq"),)

    def quantize(self, request: Request) -> Used:
        return Used()


BROKEN = {"lost": "no_such_package:Library", "nameless": f"{__name__}:Nameless", "odd": f"{__name__}:ROWS"}


def test_a_plugin_that_cannot_be_used_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint(name, value, "quantkit.quantizers") for name, value in BROKEN.items()]
    monkeypatch.setattr("quantkit.system.registry.entry_points", lambda group: points)
    found = Libraries("library", "quantkit.libraries", "quantkit.quantizers")
    assert found.names() == []  # those that ship are imported already, and registered with another
    assert set(found.broken()) == set(BROKEN)
    assert "no_such_package" in found.broken()["lost"]
    assert "Nameless does not declare name, distribution, requirements" in found.broken()["nameless"]
    assert "is no class derived from" in found.broken()["odd"]


def documented() -> dict[str, str]:
    """The files of the example in the documentation, by name."""
    return dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


def wheel_of(files: dict[str, str], folder: Path) -> Path:
    """A wheel of the modules among ``files``, with the entry points that their ``pyproject.toml`` names."""
    project = tomllib.loads(files["pyproject.toml"])["project"]
    name, version = project["name"].replace("-", "_"), project["version"]
    groups: dict[str, dict[str, str]] = project["entry-points"]
    points = ""
    for group, named in groups.items():
        points += "\n".join([f"[{group}]", *(f"{key} = {value}" for key, value in named.items()), ""])
    info = f"{name}-{version}.dist-info"
    content = {file: text for file, text in files.items() if file.endswith((".py", ".lock"))}
    content |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": points,
    }
    lines = [f"{file},sha256={_digest(text)},{len(text.encode())}" for file, text in content.items()]
    content[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""])
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in content.items():
            archive.writestr(file, text)
    return wheel


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


COMMAND = """
import quantkit.evaluation.stage
from quantkit.cli import main
from tests.runs import score_here
quantkit.evaluation.stage.run_job = score_here
main()
"""
"""The command line, which scores in its own process, as that takes less time."""


def test_a_plugin_of_another_package_is_listed_and_runs_with_no_edit_here(float_model: Path, tmp_path: Path) -> None:
    files = documented()
    installed = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir"]
    subprocess.run([*pip, "--target", str(installed), str(wheel_of(files, tmp_path))], check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)])}

    def command(*arguments: str) -> str:
        line = [sys.executable, "-c", COMMAND, *arguments]
        done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "rounding: round to nearest" in command("methods")
    (tmp_path / "my-model").symlink_to(float_model)
    data = yaml.safe_load(files["recipe.yaml"])
    data["model"]["dtype"] = "own"
    data["evaluation"] |= {"metrics": ["perplexity", "kl_divergence"], "device": "cpu"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    command("run", "recipe.yaml")
    ours, theirs = json.loads((tmp_path / "reports" / "rounded" / "report.json").read_text())["variants"]
    assert theirs["status"] == "ok"
    assert theirs["library"]["versions"]["quantkit-rounding"] == "1.0"
    assert theirs["metrics"] == ours["metrics"]
