"""How a recipe is read: all its mistakes at once with their lines, variables, names of any script, paths."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

import quantkit
from quantkit.cli import app
from quantkit.errors import QuantkitError, RecipeError
from quantkit.recipe import Recipe, TextSpec
from quantkit.recipe.fields import named_after
from quantkit.run_history.store import History, Wanted
from quantkit.schemes import IntScheme
from tests.runs import recipe_data, write_recipe

MISTAKEN = """\
name: demo
model: ./my-model
calibration:
  sampels: 3
variants:
  - name: int4
    bitz: 4
    method: gptqq
  - name: bad one
    scheme: W4A6
gates:
  - perp <= 9
  - kl.prosa <= 0.1
evaluation:
  metrics: [pplx]
  texts: [prose]
"""
SMALL = "name: demo\nmodel: {model}\nvariants:\n  - name: a\n    bits: {bits}\n"


def mistakes(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, "demo.yaml")
    return [str(error) for error in (caught.value, *caught.value.others)]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_all_mistakes_are_told_at_once_each_with_its_line() -> None:
    found = mistakes(MISTAKEN)
    for line, words in {
        4: "unknown key 'calibration.sampels'",
        7: "unknown key 'variants[0].bitz'",
        8: "variants[0].method: unknown method 'gptqq' (did you mean 'gptq'?",
        9: "variants[1].name: must be letters",
        10: "variants[1].scheme: scheme 'W4A6'",
        11: "gates: gate 'perp <= 9': unknown metric 'perp'",
        15: "evaluation.metrics[0]: 'pplx' is not allowed",
    }.items():
        assert any(error.startswith(f"demo.yaml:{line}: {words}") for error in found), (line, words, found)
    assert len(found) == 7
    again = mistakes(MISTAKEN.replace("pplx", "ppl, kl"))
    assert "demo.yaml:11: gates: gate 'kl.prosa <= 0.1': no text is called 'prosa' (did you mean 'prose'?" in again[-1]


def test_the_command_prints_a_line_for_each_mistake(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(MISTAKEN)
    done = invoke("validate", tmp_path / "demo.yaml")
    assert done.exit_code == 2
    assert done.stderr.count("error: ") == len(done.stderr.splitlines()) == 7


def test_a_model_may_be_its_source_alone() -> None:
    assert Recipe.parse(SMALL.format(model="./my-model", bits=4)).model.source == "./my-model"


def test_variables_stand_for_what_the_environment_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "./von-außen")
    monkeypatch.setenv("BITS", "8")
    monkeypatch.delenv("ELSE", raising=False)
    found = Recipe.parse(SMALL.format(model="${MODEL}/${ELSE:-v1}", bits="${BITS}"))
    assert found.model.source == "./von-außen/v1"
    assert found.own_variants[0].base_scheme().bits == 8
    quoted = mistakes(SMALL.format(model="x", bits="'${BITS}'"))
    assert "bits: must be a valid integer, not '8' (write it without quotes)" in quoted[0]
    flow = "name: demo\nmodel: x\nvariants: [{name: a, bits: ${BITS}, overrides: {'up$': {bits: ${ELSE:-4}}}}]\n"
    inside = Recipe.parse(flow).own_variants[0]
    assert (inside.base_scheme().bits, inside.scheme_of("x.up")) == (8, IntScheme(4))
    plain = Recipe.parse(SMALL.format(model="$${MODEL}-$HOME", bits=4))
    assert plain.model.source == "${MODEL}-$HOME"
    assert Recipe.parse(plain.to_yaml()).model.source == plain.model.source


def test_a_variable_that_is_not_set_is_told_and_a_pattern_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL", raising=False)
    found = mistakes(SMALL.format(model="${MODEL}", bits="${ALSO_NOT}"))
    assert found[0].startswith("demo.yaml:2: the variable MODEL is not set")
    assert "${MODEL:-default}" in found[0]
    assert found[1].startswith("demo.yaml:5: the variable ALSO_NOT is not set")
    assert "cannot be read" in mistakes(SMALL.format(model="${not a name}", bits=4))[0]
    text = SMALL.format(model="x", bits=4) + "    overrides: {'down_proj$': {bits: 8}}\n"
    assert list(Recipe.parse(text).own_variants[0].overrides) == ["down_proj$"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "hf_abcdefghijkl"),
        ("MY_API_KEY", "plain"),
        ("db_password", "plain"),
        ("PLACE", "https://me:secret@host/x"),
    ],
)
def test_a_secret_does_not_go_through_a_variable(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    (message,) = mistakes(SMALL.format(model="${" + name + "}", bits=4))
    assert f"the variable {name} holds a secret" in message
    assert value not in message
    monkeypatch.setenv("MAX_TOKENS", "4")
    assert Recipe.parse(SMALL.format(model="x", bits="${MAX_TOKENS}")).own_variants[0].base_scheme().bits == 4


@pytest.mark.parametrize("name", ["四位", "Größe-4", "हिंदी", "модель.v2", "4bit_a"])
def test_names_are_of_any_script(name: str) -> None:
    data = {"name": name, "model": "x", "variants": [{"name": name, "title": f"{name}: «as said»"}]}
    assert Recipe.parse(yaml.safe_dump(data)).variants[0].name == name
    text = f"{name}.jsonl"
    given = data | {"evaluation": {"texts": [text]}, "gates": [f"ppl.{name} <= 9"]}
    assert Recipe.parse(yaml.safe_dump(given)).evaluation.texts[0].name == name


@pytest.mark.parametrize("name", ["", "a b", "../up", "a/b", ".hidden", "-dash", "四" * 61, "a\u202eb"])
def test_a_name_that_is_no_file_name_is_refused(name: str) -> None:
    assert "name" in mistakes(yaml.safe_dump({"name": name, "model": "x", "variants": [{"name": "a"}]}))[0]


def test_a_name_is_composed_and_made_of_any_file_name() -> None:
    text = yaml.safe_dump({"name": "Gro\u0308ße", "model": "x", "variants": [{"name": "a"}]})
    assert Recipe.parse(text).name == "Größe"
    assert named_after("評測 (v2)", "text") == "評測--v2-"
    assert named_after("...", "text") == "text"
    assert TextSpec.model_validate("./my data.txt").name == "my-data"


def test_files_are_looked_for_here_and_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    for name in ("model", "数据.jsonl"):
        (tmp_path / "recipes" / name).mkdir() if name == "model" else (tmp_path / "recipes" / name).write_text("{}\n")
    data = {
        "name": "demo",
        "model": "./model",
        "calibration": {"dataset": "数据.jsonl"},
        "variants": [{"name": "a"}],
        "evaluation": {"texts": ["prose", "./数据.jsonl"], "tasks": ["t.yaml"], "samples": "数据.jsonl"},
    }
    file = write_recipe(tmp_path / "recipes" / "r.yaml", data)
    monkeypatch.chdir(tmp_path)
    found = Recipe.load("recipes/r.yaml")
    assert found.model.source == "recipes/model"
    assert found.calibration.dataset == "recipes/数据.jsonl"
    assert found.evaluation.texts[1].file == "recipes/数据.jsonl"
    assert found.evaluation.samples is not None
    assert found.evaluation.samples.file == "recipes/数据.jsonl"
    done = invoke("validate", file)
    assert done.exit_code == 2
    line = 1 + file.read_text(encoding="utf-8").splitlines().index("  - t.yaml")
    assert f"{file}:{line}: evaluation.tasks[0]: there is no t.yaml" in done.stderr
    (tmp_path / "model").mkdir()
    assert Recipe.load("recipes/r.yaml").model.source == "./model"


def test_what_is_missing_is_told_before_anything_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in ("run", "plan"):
        stage = importlib.import_module(f"quantkit.pipeline.{module}")
        monkeypatch.setattr(stage, "merged_source", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    scoring = {"texts": ["./gone.txt"], "context_length": 100_000, "tasks": ["arc_easy"], "device": "cuda:77"}
    scoring["samples"] = "gone-prompts.txt"
    data = recipe_data(model, Path("gone.jsonl"), tmp_path / "run", [{"name": "a"}], evaluation=scoring)
    for function in (quantkit.run, quantkit.plan):
        with pytest.raises(QuantkitError) as caught:
            function(Recipe.parse(yaml.safe_dump(data)))
        told = [str(error) for error in (caught.value, *caught.value.others)]
        for words in (
            "calibration.dataset: there is no gone.jsonl",
            "evaluation.texts[0]: there is no ./gone.txt",
            "evaluation.samples: there is no gone-prompts.txt",
            "evaluation.device: device cuda:77 is not available",
            "evaluation.context_length is 100000, and the model reads",
            "lm-eval",
        ):
            assert any(words in each for each in told), (words, told)
    data["model"] = {"source": str(tmp_path / "nothing")}
    data["calibration"] = {"dataset": "alpca_gpt4"}
    with pytest.raises(QuantkitError) as caught:
        quantkit.run(Recipe.parse(yaml.safe_dump(data)))
    told = [str(error) for error in (caught.value, *caught.value.others)]
    assert f"model.source: there is no {tmp_path / 'nothing'}" in told[0]
    assert any("unknown data set 'alpca_gpt4' (did you mean 'alpaca_gpt4'?" in each for each in told)


def test_one_bad_variant_does_not_end_a_plan(model: Path, records: Path, tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {"name": "good", "method": "rtn"},
        {"name": "bad", "method": "rtn", "group_size": 128},
    ]
    file = write_recipe(tmp_path / "r.yaml", recipe_data(model, records, tmp_path / "run", variants))
    done = invoke("plan", file)
    assert done.exit_code == 1
    assert "bad cannot run: " in done.stdout
    assert "group_size 128" in done.stdout
    plan = json.loads(invoke("plan", file, "--json").stdout)
    stages = {each["stage"] for each in plan["time"]["stages"]}
    assert "evaluate: good" in stages
    assert "evaluate: bad" not in stages
    good, bad = plan["variants"]
    assert good["state"] == "to do"
    assert bad["state"].startswith("cannot run: ")


def test_names_and_titles_of_any_script_work_from_end_to_end(model: Path, records: Path, tmp_path: Path) -> None:
    here = tmp_path / "Prüfung 测试"
    here.mkdir()
    text = here / "評測.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    data = recipe_data(model, records, here / "报告", [{"name": "四位-ü", "method": "rtn", "title": "第一 <b>版</b>"}])
    data |= {"name": "每周", "title": "Für Müller & Söhne", "gates": ["ppl.評測 <= 1e9"]}
    data["evaluation"] |= {"texts": [str(text)]}
    data["history"] = {"file": str(here / "历史.sqlite")}
    found = quantkit.run(Recipe.parse(yaml.safe_dump(data, allow_unicode=True)))
    assert found["status"] == "ok", found
    assert (here / "报告" / "variants" / "四位-ü" / "config.json").is_file()
    page = (here / "报告" / "report.html").read_text(encoding="utf-8")
    assert "<title>Für Müller &amp; Söhne" in page
    assert "第一 &lt;b&gt;版&lt;/b&gt;" in page
    lines = (here / "报告" / "report.md").read_text(encoding="utf-8")
    assert lines.startswith("# Für Müller &amp; Söhne (每周)")
    assert "`四位-ü` 第一 &lt;b&gt;版" in lines
    (record,) = History(here / "历史.sqlite").runs(Wanted(name="每周"))
    assert record.variants[0].name == "四位-ü"
    assert "每周" in invoke("history", "--all-columns", "--file", here / "历史.sqlite").stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: demo\nmodel:\n\tsource: x\n", "demo.yaml:3 is not valid YAML: found character '\\t' that cannot start"),
        ("name: demo\nmodel:\n\tsource: x\n", "(indent with spaces"),
        ("name: demo\nmodel: x\nname: again\n", "demo.yaml:3 is not valid YAML: key 'name' is given twice"),
        (
            "a: &a {bits: 4}\nb:\n  c: *a\n",
            "demo.yaml:3 is not valid YAML: aliases (*name) are not allowed (write it",
        ),
        ("name: demo\nvariants:\n  - {name: a, <<: {bits: 4}}\n", "goes into 'defaults'"),
        ("name: demo\nmodel: {source: ${A}\nvariants: [", "demo.yaml:3 is not valid YAML: "),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line_and_the_way_out(text: str, said: str) -> None:
    assert said in mistakes(text)[0]


def test_a_tilde_is_home_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = """\
name: demo
model: {source: ~/m, adapter: ~/a}
calibration: {dataset: ~/c.jsonl, chat_template: ~/t.jinja}
variants: [{name: a}]
evaluation: {texts: [~/t.txt], tasks: [~/t.yaml], answers: ~/q.jsonl, samples: ~/p.txt}
report: {folder: ~/out}
history: {file: ~/h.sqlite}
"""
    found = Recipe.parse(text)
    scoring = found.evaluation
    assert scoring.answers is not None
    assert scoring.samples is not None
    told = [
        found.model.source, found.model.adapter[0].source, found.calibration.dataset, found.calibration.chat_template,
        scoring.texts[0].file, scoring.tasks[0].file, scoring.answers.file, scoring.samples.file, str(found.folder),
        str(found.history_file),
    ]  # fmt: skip
    assert [path for path in told if path is None or not path.startswith(str(tmp_path))] == []
    assert (
        "there is no home folder '~nobody-of-this-name'" in mistakes(text.replace("~/m", "~nobody-of-this-name/m"))[0]
    )
