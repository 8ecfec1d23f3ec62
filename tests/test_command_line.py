"""The command line and the Python API as people type them: shared options, dry runs, targets, texts for lists."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.testing import CliRunner, Result

import quantkit
from quantkit import evaluation
from quantkit.cli import app
from quantkit.errors import QuantkitError, RecipeError
from quantkit.exports.manifest import read_manifest
from quantkit.methods import METHODS
from quantkit.recipe import Recipe
from quantkit.recipe.targets import runtime_of, variant_for
from tests.runs import Notebook, recipe_data, score_here, write_recipe


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that needs no calibration."""
    out = tmp_path_factory.mktemp("plain") / "out"
    return quantkit.quantize(model, out=out, method="RTN", scheme="W4A16", group_size=32)


def test_the_module_is_the_command_and_every_command_takes_h() -> None:
    done = subprocess.run([sys.executable, "-m", "quantkit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"quantkit {quantkit.__version__}\n"
    for name in getattr(typer.main.get_command(app), "commands"):  # noqa: B009 - of click's Group
        assert invoke(name, "-h").exit_code == 0
    assert invoke("env", "list", "-h").exit_code == 0


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS.get("rtn"), "warnings", staticmethod(lambda _: ("too few",)), raising=False)


@pytest.mark.usefixtures("warned")
@pytest.mark.parametrize("place", ["before", "behind"])
def test_quiet_leaves_the_result_and_warnings(place: str, model: Path, tmp_path: Path) -> None:
    told = ["quantize", model, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 32]
    done = invoke("-q", *told) if place == "before" else invoke(*told, "-q")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"checkpoint: {tmp_path / 'out'}\n"
    assert "warning: too few" in done.stderr
    assert "done in" not in done.stderr
    assert "done in" in invoke(*told[:3], tmp_path / "again", *told[4:]).stderr


def test_verbose_shows_where_an_error_came_from(tmp_path: Path) -> None:
    done = invoke("validate", tmp_path / "no.yaml", "-v")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("error: cannot read recipe")
    assert "Traceback" not in invoke("validate", tmp_path / "no.yaml").stderr


def test_a_dry_run_tells_the_plan_and_writes_nothing(
    model: Path, records: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = recipe_data(model, records, tmp_path / "run", [{"name": "rtn", "method": "rtn"}], gates=["ppl <= 9"])
    file = write_recipe(tmp_path / "r.yaml", data)
    for command in ("run", "check"):
        done = invoke(command, file, "--dry-run")
        assert done.exit_code == 0, done.output
        assert "14 of 15 linear layers" in done.stdout
    done = invoke("quantize", model, "-o", "out", "--for", "Ollama", "--calibration", records, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "gguf" in done.stdout
    assert "results in out" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"r.yaml"}
    assert "config.json" in invoke("push", plain, "me/it", "--dry-run").stdout


@pytest.mark.parametrize(
    ("target", "keys", "wanted"),
    [
        ("ollama", {}, "gguf"),
        ("LM-Studio", {"scheme": "Q4_K_M"}, "gguf"),
        ("vLLM", {"method": "rtn"}, "compressed-tensors"),
        ("vllm", {"scheme": "nf4", "method": "rtn"}, "bitsandbytes"),
        ("SGLang", {"method": "rtn"}, "compressed-tensors"),
        ("text-generation-inference", {}, "compressed-tensors"),
        ("GPT4All", {}, "gguf"),
        ("gptqmodel", {}, "gptq"),
        ("gptqmodel", {"method": "awq"}, "awq"),
        ("transformers", {"method": "none"}, "float"),
    ],
)
def test_who_loads_it_decides_the_format(target: str, keys: dict[str, Any], wanted: str) -> None:
    variant, remark = variant_for(target, {"name": "v", **keys})
    assert variant.format == wanted
    assert bool(remark) == (
        target in ("LM-Studio", "SGLang", "text-generation-inference", "GPT4All") or wanted == "bitsandbytes"
    )


def test_a_target_that_cannot_be_is_told_why() -> None:
    with pytest.raises(RecipeError, match="that vllm loads suits this: compressed-tensors cannot store q4_k_m"):
        variant_for("vllm", {"name": "v", "scheme": "q4_k_m"})
    with pytest.raises(RecipeError, match="ollama does not load format AWQ"):
        variant_for("ollama", {"name": "v", "format": "AWQ"})
    with pytest.raises(RecipeError, match="did you mean 'ollama'"):
        runtime_of("olama")


def test_an_adapter_is_merged_on_the_way(model: Path, tmp_path: Path) -> None:
    done = invoke("quantize", model, "-o", tmp_path / "out", "--adapter", "./none=x")
    assert "--adapter ./none=x: 'x' is no weight" in done.stderr
    done = invoke("quantize", model, "-o", tmp_path / "out", "--adapter", tmp_path / "none", "--method", "rtn")
    assert f"model.adapter[0]: there is no {tmp_path / 'none'}" in done.stderr


def test_evaluate_prints_a_table_or_json(model: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "run_job", score_here)
    monkeypatch.setenv("COLUMNS", "80")
    told = ["evaluate", plain, "--reference", model, "--text", "Prose", "--context-length", 32, "--max-tokens", 96]
    table = invoke(*told, "--device", "CPU", "--dtype", "fp32")
    assert table.exit_code == 0, table.output
    assert max(map(len, table.stdout.splitlines())) <= 80
    found = json.loads(invoke(*told, "--json").stdout)
    for name in ("perplexity", "top1_agreement"):
        assert f"{found['metrics'][name]['prose']:.4g}" in table.stdout
    assert f"{found['metrics']['kl_divergence']['prose']['mean']:.4g} ± " in table.stdout
    (beside,) = (line for line in table.stdout.splitlines() if "perplexity of the float model" in line)
    alone = quantkit.evaluate(model, texts="prose", context_length=32, max_tokens=96)
    assert f"{alone['metrics']['perplexity']['prose']:.4g}" in beside


def test_evaluate_tells_what_is_wrong_before_it_begins(plain: Path) -> None:
    done = invoke("evaluate", plain, "--text", "./nix.txt", "--context-length", 100_000, "--loader", "vlm")
    assert "'vlm' is not allowed (did you mean 'vllm'?" in done.stderr
    done = invoke("evaluate", plain, "--text", "./nix.txt", "--context-length", 100_000)
    assert done.exit_code == 2
    assert "evaluation.texts[0]: there is no ./nix.txt" in done.stderr
    assert "evaluation.context_length is 100000" in done.stderr


def test_evaluate_takes_a_model_of_the_hub(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.source import hub

    asked: list[str] = []

    def download(reference: str, *_: object, **__: object) -> Any:
        asked.append(reference)
        raise QuantkitError("the hub is far away")

    monkeypatch.setattr(hub, "download", download)
    assert "the hub is far away" in invoke("evaluate", "some-org/some-model").stderr
    assert asked == ["some-org/some-model"]


def test_a_context_is_held_against_the_config_of_a_hub_model_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.pipeline import preflight
    from quantkit.source import hub

    (tmp_path / "config.json").write_text('{"text_config": {"max_position_embeddings": 64}}')
    monkeypatch.setattr(preflight, "fetched_config", lambda _: tmp_path / "config.json")
    monkeypatch.setattr(hub, "download", lambda *_, **__: pytest.fail("the model was fetched"))
    done = invoke("evaluate", "some-org/some-model", "--context-length", 128)
    assert "evaluation.context_length is 128, and the model reads 64 tokens at most" in done.stderr


def test_names_of_dtypes_and_states_are_checked_at_once(model: Path, plain: Path) -> None:
    assert quantkit.estimate(model, group_size=32, dtype="BF16").part("file").nbytes > 0
    with pytest.raises(QuantkitError, match="'fp17' is no dtype"):
        quantkit.estimate(model, group_size=32, dtype="fp17")
    assert "did you mean 'passed'?" in invoke("history", "--status", "pased").stderr
    assert "'bf17' is no compute dtype" in invoke("verify", plain, "--dtype", "bf17").stderr


# Python


def test_the_package_is_typed_and_has_a_version() -> None:
    assert files("quantkit").joinpath("py.typed").is_file()
    assert "__version__" in dir(quantkit)
    code = "import quantkit, logging; print([type(h).__name__ for h in logging.getLogger('quantkit').handlers])"
    assert "NullHandler" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


def test_a_recipe_may_be_a_dict(model: Path, records: Path, tmp_path: Path) -> None:
    data = recipe_data(model, records, tmp_path / "run", [{"name": "rtn", "method": "rtn"}])
    assert quantkit.plan(data)["variants"][0]["state"] == "to do"
    with pytest.raises(QuantkitError, match="recipe: key 'model' is missing"):
        quantkit.run({"name": "x", "variants": [{"name": "a"}]})
    with pytest.raises(QuantkitError, match="has no gates"):
        quantkit.check(data)


def test_one_text_may_stand_where_a_list_is_meant(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "run_job", score_here)
    found = quantkit.evaluate(plain, texts="prose", metrics="ppl", context_length=32, max_tokens=96)
    assert list(found["metrics"]["perplexity"]) == ["prose"]
    given = {
        "name": "x", "model": "m", "variants": [{"name": "a", "ignore": "lm_head", "transforms": "awq"}],
        "gates": "ppl <= 9", "evaluation": {"texts": "prose", "tasks": "arc_easy"}, "report": {"formats": "HTML"},
    }  # fmt: skip
    recipe = Recipe.parse(yaml.safe_dump(given))
    assert recipe.own_variants[0].ignore == ("lm_head",)
    assert recipe.gates == ("ppl <= 9",)
    assert (recipe.evaluation.texts[0].name, recipe.evaluation.tasks[0].name) == ("prose", "arc_easy")
    assert recipe.report.formats == ("html",)


def test_what_is_printed_of_an_object_is_a_line(model: Path, records: Path, tmp_path: Path) -> None:
    recipe = Recipe.of(recipe_data(model, records, tmp_path, [{"name": "a", "method": "rtn"}]))
    assert repr(recipe) == f"Recipe('demo', model={str(model)!r}, variants: a)"
    assert repr(recipe.variants[0]) == "VariantSpec('a': rtn, int4 g32 sym, compressed-tensors)"
    assert len(repr(quantkit.estimate(model, group_size=32))) < 300


@pytest.mark.usefixtures("warned")
def test_what_happens_is_logged_and_not_printed(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="quantkit"):
        quantkit.quantize(model, out=tmp_path / "out", method="rtn", group_size=32)
    assert f"source: {model}" in caplog.messages
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == ["warning: too few"]
    assert capsys.readouterr() == ("", "")
    observer = Notebook()
    quantkit.quantize(model, out=tmp_path / "again", method="rtn", group_size=32, observer=observer)
    assert observer.stages
    assert (read_manifest(tmp_path / "again") or {})["schema"] == 1
