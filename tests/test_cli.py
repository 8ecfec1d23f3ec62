from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner, Result

from quantkit import evaluation
from quantkit.cli import app
from quantkit.cli.catalogue import schemes_taken
from quantkit.cli.given import settings_of
from quantkit.errors import RecipeError, SchemeError
from quantkit.formats import FORMATS
from quantkit.methods import METHODS, tuning
from quantkit.schemes import SCHEMES, GgmlMixture, Scheme
from quantkit.schemes.kinds import keys_of
from quantkit.system.distribution import own_version
from quantkit.transforms import TRANSFORMS
from tests.runs import hidden_names, recipe_data, score_here, write_recipe

COMMANDS = list(getattr(typer.main.get_command(app), "commands"))  # noqa: B009 - of click's Group
MAIN = [sys.executable, "-c", "from quantkit.cli import main; main()"]


@pytest.fixture(scope="module")
def recipe(model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    variants: list[dict[str, Any]] = [
        {"name": "rtn", "method": "rtn"},
        {"name": "misfit", "method": "rtn", "group_size": 128},
    ]
    data = recipe_data(model, records, folder / "run", variants, gates=["kl_divergence.mean <= 100"])
    return write_recipe(folder / "demo.yaml", data)


@pytest.fixture(scope="module")
def run(recipe: Path) -> subprocess.CompletedProcess[str]:
    """The recipe, run by the command itself."""
    return subprocess.run([*MAIN, "run", str(recipe)], capture_output=True, text=True, check=False)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_run_prints_its_table_and_exits_with_one_if_a_variant_failed(
    run: subprocess.CompletedProcess[str], recipe: Path
) -> None:
    assert run.returncode == 1, run.stderr
    assert "rtn" in run.stdout
    assert "gate passed: rtn: kl_divergence.mean <= 100" in run.stdout
    assert "gate FAILED: misfit: kl_divergence.mean <= 100" in run.stdout
    assert run.stdout.rstrip().endswith(f"report: {recipe.parent / 'run' / 'report.html'}")
    assert "quantize: rtn, misfit ..." in run.stderr
    assert "misfit failed: 77.8% of the block weights would stay float, such as model.layers." in run.stderr
    assert "Traceback" not in run.stderr
    assert hidden_names(recipe.parent) == []


def test_a_report_is_rendered_again_where_it_is_wanted(
    run: subprocess.CompletedProcess[str], recipe: Path, tmp_path: Path
) -> None:
    done = invoke("report", recipe.parent / "run", "--out", tmp_path / "again")
    assert done.exit_code == 0, done.output
    written = {Path(line).name for line in done.stdout.splitlines()}
    assert {"report.json", "report.html", "report.md"} <= written
    assert {path.name for path in (tmp_path / "again").iterdir()} == written
    assert (tmp_path / "again" / "report.json").read_text() == (recipe.parent / "run" / "report.json").read_text()


def test_a_report_of_an_older_shape_is_rendered_too(
    run: subprocess.CompletedProcess[str], recipe: Path, tmp_path: Path
) -> None:
    content = json.loads((recipe.parent / "run" / "report.json").read_text())
    del content["recipe"]["report"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert invoke("report", tmp_path).exit_code == 0
    assert (tmp_path / "report.html").exists()


def test_a_plan_is_a_table_or_json(run: subprocess.CompletedProcess[str], model: Path, records: Path) -> None:
    folder = Path(run.args[-1]).parent
    data = recipe_data(model, records, folder / "run", [{"name": "rtn", "method": "rtn"}, {"name": "new"}])
    path = write_recipe(folder / "plan.yaml", data)
    table = CliRunner().invoke(app, ["plan", str(path)], env={"COLUMNS": "240"})
    assert table.exit_code == 0, table.output
    assert "14 of 15 linear layers" in table.stdout
    assert "12 records, 48 tokens each at most" in table.stdout
    found = json.loads(invoke("plan", path, "--json").stdout)
    assert [variant["state"] for variant in found["variants"]] == ["finished", "to do"]
    assert found["source"]["dtype"] == "bfloat16"


def test_validate_says_what_the_recipe_is(recipe: Path) -> None:
    done = invoke("validate", recipe)
    assert done.exit_code == 0
    assert f"{recipe} is valid: 2 variants of" in done.stdout


def test_quantize_writes_a_checkpoint_and_says_where(model: Path, tmp_path: Path) -> None:
    done = invoke("quantize", model, "--out", tmp_path / "out", "--method", "rtn", "--group-size", 32, "--asymmetric")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"checkpoint: {tmp_path / 'out'}\n"
    made_from = json.loads((tmp_path / "out" / "stage.json").read_text())["made_from"]
    assert made_from["variant"]["symmetric"] is False


def test_quantize_calibrates_on_a_file_of_records(model: Path, records: Path, tmp_path: Path) -> None:
    options = ["--calibration", records, "--samples", 4, "--max-length", 32, "--group-size", 32, "--bits", 8]
    done = invoke("quantize", model, "-o", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_quantize_goes_to_the_device_that_is_named(model: Path, tmp_path: Path) -> None:
    done = invoke("quantize", model, "-o", tmp_path / "out", "--method", "rtn", "--device", "cuda:99")
    assert done.exit_code != 0
    assert "device cuda:99 is not available" in done.stderr
    done = invoke("quantize", model, "-o", tmp_path / "out", "--method", "rtn", "--device", "tpu")
    assert "'tpu' is not a device: use auto, cpu, cuda or cuda:N" in done.stderr


def test_evaluate_prints_json(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "run_job", score_here)
    done = invoke("evaluate", model, "--text", "prose", "--context-length", 32, "--max-tokens", 64, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["metrics"]["perplexity"]["prose"] > 1


def test_methods_are_listed_with_what_they_need_take_and_cost() -> None:
    text = invoke("methods").stdout
    blocks = reversed(text.split("\n\n"))  # so that a library of the same name, which comes later, does not win
    listed = {block.partition(":")[0]: block for block in blocks}
    for method in METHODS:
        block = listed[method.name]
        assert f"{method.name}: {method.summary}" in block
        assert all(f"\n    {label:<14}" in block for label in ("needs", "schemes", "bits", "source", "cost"))
        assert method.source in block
        for option in method.Options.model_fields:
            assert f"      {option} = " in block
    assert "needs         no data; with range: weighted calibration: mean x² of the inputs" in listed["rtn"]
    assert "needs         calibration: XᵀX of the inputs" in listed["gptq"]
    assert "refinements = 1" in listed["gptq"]
    assert "fraction of the Gram matrix's mean diagonal" in listed["gptq"]
    for transform in TRANSFORMS:
        shown = " ".join(text[text.index("\nTransforms") :].split())
        assert f"{transform.name}: {transform.summary} needs" in shown
        assert all(f"{option} = " in shown for option in transform.Options.model_fields)
    assert "awq+gptq, awq+hqq" in shown
    tuned = " ".join(text[text.index("\nTuning") : text.index("\nLibraries")].split())
    assert f"tune: {tuning.SUMMARY} needs calibration rows" in tuned
    assert "gptq+tune" in tuned
    assert "none+tune" not in tuned
    assert "train = [scales, zeros]" in tuned
    assert all(f"{option} = " in tuned for option in tuning.TuneOptions.model_fields)
    assert "``" not in text
    assert ":class:" not in text


def test_schemes_are_listed_with_their_keys_and_bits() -> None:
    listed = {block.partition(":")[0]: block for block in invoke("methods").stdout.split("\n\n")}
    bits = {"int": "4.25", "nf4": "4.127", "fp4": "4.127", "fp8": "8.004", "mxfp4": "4.25", "nvfp4": "4.5"}
    bits |= {"q2_k": "2.625", "q3_k": "3.438", "q4_k": "4.5", "q5_k": "5.5", "q6_k": "6.562", "iq4_nl": "4.5"}
    bits |= {"float16": "16", "bfloat16": "16", "float": "16"}
    mixtures = {scheme.kind for scheme in SCHEMES if issubclass(scheme, GgmlMixture)}
    assert set(bits) | mixtures == set(SCHEMES.names())
    for kind, width in bits.items():
        assert f"    bits          {width} per weight" in listed[kind]
        assert SCHEMES.get(kind).source in " ".join(listed[kind].split())
        assert all(f"      {key} = " in listed[kind] for key in keys_of(kind))


def test_formats_are_listed_with_the_schemes_that_they_store() -> None:
    listed = {block.partition(":")[0]: block for block in invoke("formats").stdout.split("\n\n")}
    assert set(FORMATS.names()) <= set(listed)
    assert "vllm" in listed["compressed-tensors"]
    assert "    schemes       int" in listed["compressed-tensors"]
    assert "nf4" not in listed["compressed-tensors"]
    told = " ".join(listed["compressed-tensors"].split())
    assert "bits: auto int2, int3, int4, int5, int6, int8, float; for vllm int4, int8, float" in told
    assert "bits: auto" not in listed["aqlm"]


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (
            lambda scheme: scheme.kind == "int" and scheme.bits in (4, 8),
            "int4/8 (float zeros too, axis 0 too, w8a8 too, w4a8 too, desc_act too)",
        ),
        (
            lambda scheme: scheme.kind == "int" and scheme.symmetric and not scheme.activations and not scheme.desc_act,
            "int2-8 (symmetric only)",
        ),
        (lambda scheme: scheme.kind == "fp8" and scheme.granularity != "block", "fp8 (tensor, channel, a8 too)"),
        (lambda scheme: scheme.kind in ("nf4", "mxfp4"), "mxfp4, nf4"),
    ],
)
def test_what_is_taken_is_asked_of_the_check(limit: Any, words: str) -> None:
    def check(scheme: Scheme) -> None:
        if not limit(scheme):
            raise SchemeError("no")

    assert ", ".join(schemes_taken(check)) == words


def test_warnings_go_to_standard_error(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS.get("rtn"), "warnings", staticmethod(lambda _: ("too few",)), raising=False)
    for command in ("validate", "plan"):
        found = invoke(command, recipe)
        assert "warning: variant rtn: too few" in found.stderr or "group_size 128" in found.stderr
        assert "too few" not in found.stdout
    assert invoke("validate", recipe).stderr.count("warning: variant rtn: too few") == 1


def test_any_key_of_a_variant_can_be_set(model: Path, tmp_path: Path) -> None:
    given = ["--method", "rtn", "--scheme", "fp8", "--set", "granularity=block", "--set", "ignore=[lm_head, down]"]
    done = invoke("quantize", model, "--out", tmp_path / "out", *given)
    assert done.exit_code == 0, done.output
    layers = json.loads((tmp_path / "out" / "manifest.json").read_text())["layers"]
    assert {layer["granularity"] for layer in layers.values()} == {"block"}
    assert not any("down" in name for name in layers)


def test_a_key_of_a_section_is_set_by_its_path() -> None:
    assert settings_of(["tune.steps=3", "bits=3", "tune.train=[norms]"]) == {
        "tune": {"steps": 3, "train": ["norms"]},
        "bits": 3,
    }
    with pytest.raises(RecipeError, match="'tune' is given as a whole too"):
        settings_of(["tune=true", "tune.steps=3"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("damping", "--set damping is not KEY=VALUE"),
        ("=3", "--set =3 is not KEY=VALUE"),
        ("out=x", "'out' is not a key of a variant"),
        ("bitz=3", "quantize: unknown key 'bitz' (did you mean 'bits'?"),
        ("bits=[", "--set bits=[ is not valid YAML"),
        ("tune.=3", "--set tune.=3 is not KEY=VALUE"),
        ("tune.step=3", "unknown key 'tune.step' (did you mean 'steps'?"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(tmp_path: Path, text: str, words: str) -> None:
    done = invoke("quantize", "none", "--out", tmp_path / "out", "--set", text)
    assert done.exit_code == 2
    assert words in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = invoke(command, "--help")
    assert done.exit_code == 0
    assert command in done.stdout


def test_help_lists_every_command_and_nothing_asks_for_help() -> None:
    listed = invoke("--help")
    assert listed.exit_code == 0
    assert all(command in listed.stdout for command in COMMANDS)
    assert "Usage" in invoke().output


def test_the_version() -> None:
    assert invoke("--version").stdout == f"quantkit {own_version()}\n"


@pytest.mark.parametrize(
    "arguments",
    [["validate"], ["nonsense"], ["run", "a", "b"], ["quantize", "m"], ["quantize", "m", "-o", "x", "--bits", "four"]],
)
def test_usage_errors_exit_with_two(arguments: list[str]) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_an_interrupt_says_that_what_is_finished_is_kept(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quantkit.api.recipes.run", interrupted)
    done = invoke("run", recipe)
    assert done.exit_code == 130
    assert "interrupted: what is finished is kept, the same command goes on from there" in done.stderr
