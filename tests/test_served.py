"""vLLM as a runtime that scores: by a stand-in for the package, in a process as vLLM's own would be."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app
from quantkit.cli.figures import figure_table
from quantkit.errors import EvaluationError, QuantkitError, RecipeError
from quantkit.evaluation import EvaluationJob
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.harness import HarnessModel
from quantkit.evaluation.speed import measure_speed
from quantkit.evaluation.stage import computed, evaluation_identity
from quantkit.pipeline.preflight import check_loader, check_served
from quantkit.recipe import EvaluationSpec
from quantkit.report.numbers import ABSENT
from quantkit.report.served import build_served
from quantkit.runtimes import RUNTIMES, _distant
from quantkit.runtimes._choice import choose_runtime
from quantkit.runtimes.base import LoadedModel, LoadOptions
from quantkit.runtimes.vllm import SCRIPT, VARIABLE
from quantkit.system.validation import parse_section
from quantkit.verification import verdict as verdicts
from quantkit.verification.worker import perform
from tests.runs import edit_json, score_here
from tests.tiny import make_model, tiny_tokenizer

STAND_IN = Path(__file__).with_name("fake_vllm")
IDS = torch.arange(5, 45)
TEXT = "The tide went out further than anyone had seen, and we walked to the rocks. " * 5


@pytest.fixture(autouse=True, scope="module")
def stand_in() -> Iterator[None]:
    """Processes find the stand-in, and quantkit, of which it is made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN), str(STAND_IN.parents[1])]))
        patch.setenv(VARIABLE, sys.executable)
        yield


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantkit.quantize(model, out=tmp_path_factory.mktemp("out") / "rtn", method="rtn", group_size=32)


@pytest.fixture(scope="module")
def served(exported: Path) -> Iterator[LoadedModel]:
    found = RUNTIMES.get("vllm").load(exported, LoadOptions(context_length=99, batch=4))
    yield found
    found.close()
    assert found.process is not None
    assert not psutil.pid_exists(found.process)


@pytest.fixture
def loaded(served: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[LoadOptions]:
    """Whoever loads the file in vLLM gets the model that is there; with which options is listed."""
    asked: list[LoadOptions] = []

    def load(path: Path, options: LoadOptions) -> LoadedModel:
        asked.append(options)
        return served

    monkeypatch.setattr(RUNTIMES.get("vllm"), "load", load)
    monkeypatch.setattr(served, "close", lambda: None)
    return asked


@pytest.fixture(scope="module")
def decoded(exported: Path) -> LoadedModel:
    return RUNTIMES.get("reference").load(exported, LoadOptions(dtype="float32"))


def plain(table: Any) -> str:
    """A table in characters."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def failing(folder: Path, how: str) -> Path:
    """A checkpoint that the stand-in fails on."""
    checkpoint = make_model(folder / "model")
    (checkpoint / "fails").write_text(how, encoding="utf-8")
    return checkpoint


def spec_of(tmp_path: Path, **keys: Any) -> EvaluationSpec:
    (tmp_path / "tide.txt").write_text(TEXT, encoding="utf-8")
    given = {"texts": str(tmp_path / "tide.txt"), "context_length": 64, "device": "cpu", "samples": 2}
    return parse_section(EvaluationSpec, {**given, **keys}, "evaluation")


# The model


def test_logits_are_those_of_the_engine_in_its_dtype(served: LoadedModel, decoded: LoadedModel) -> None:
    for count in (1, 2, 3, 40):
        assert torch.equal(served.logits(IDS[:count]), decoded.logits(IDS[:count]))
    rows = [IDS[:7], IDS[3:30]]
    assert [len(found) for found in served.logits_of(rows)] == [7, 27]
    assert (served.vocabulary, served.dtype, served.device) == (decoded.vocabulary, "float32", "cpu")
    assert served.weights_bytes() == decoded.weights_bytes()
    assert served.dropped == ("passed",)
    assert served.settings["VLLM_CPU_INT4_W4A8"] == "0"
    assert served.facts()["vllm"] == "0.0.1"


def test_it_goes_on_as_the_reference_decoder_does(served: LoadedModel, decoded: LoadedModel) -> None:
    expected = list(islice(decoded.greedy(IDS), 12))
    going = served.greedy(IDS)
    assert list(islice(going, 5)) == expected[:5]
    assert list(islice(going, 7)) == expected[5:]
    ids, seconds = served.decode(IDS, 12)
    assert (ids, len(seconds)) == (expected, 12)
    assert list(islice(served.greedy(IDS[:9]), 1)) == list(islice(decoded.greedy(IDS[:9]), 1))


def test_what_does_not_fit_is_said(served: LoadedModel) -> None:
    full = served.greedy(torch.ones(97, dtype=torch.int64))
    assert len(list(islice(full, 3))) == 3
    with pytest.raises(EvaluationError, match="vllm was given room for 100 tokens, which are full"):
        next(full)
    with pytest.raises(EvaluationError, match="vllm cannot give logits: ValueError: the context length is 100 tokens"):
        served.logits(torch.ones(100, dtype=torch.int64))
    assert len(served.logits(IDS)) == len(IDS)
    server = vars(served)["_server"]
    with pytest.raises(EvaluationError, match="the context length is 100 tokens, and 90 are given"):
        server.ask("generate", rows=[[5, 6, 7], [5] * 90], count=20)
    assert len(server.ask("generate", rows=[[5, 6, 7]], count=20)["seconds"]) == 20  # alone: the row before is gone
    assert served.logits(IDS).shape[0] == len(IDS)


def test_rows_are_read_and_continued_at_once(served: LoadedModel) -> None:
    found = served.throughput(IDS.expand(4, -1), 6)
    assert len(found.steps) == 5  # two rows begin at a step
    assert served.throughput(IDS.expand(4, -1), 0).steps == ()
    with pytest.raises(EvaluationError, match="never had all rows at work at once"):
        served.throughput(IDS.expand(4, -1).repeat(4, 1), 1)


def test_a_harness_asks_it_as_any_other(served: LoadedModel, decoded: LoadedModel) -> None:
    class Request:
        def __init__(self, *args: Any) -> None:
            self.args = args

    pairs = [Request("the tide", " went"), Request("the tide", " goes"), Request("", "rocks")]
    written = [Request("the tide", {"until": ["e"], "max_gen_toks": 6})]
    found = []
    for each in (served, decoded):
        harness = HarnessModel(each, tiny_tokenizer(), {2}, 90, lambda done, total: None)
        found.append((harness.loglikelihood(pairs), harness.generate_until(written)))
    (scores, texts), (expected, expected_texts) = found
    assert [each[0] for each in scores] == pytest.approx([each[0] for each in expected], rel=1e-5)
    assert [each[1] for each in scores] == [each[1] for each in expected]
    assert texts == expected_texts


# Scores


def test_a_served_file_is_scored_beside_the_float_reference(
    model: Path, exported: Path, tmp_path: Path, loaded: list[LoadOptions]
) -> None:
    logprobs = tmp_path / "logprobs"
    spec = spec_of(tmp_path, loader="vllm", batch_sizes=[1, 3], metrics=["ppl", "kl", "top1", "memory", "speed"])
    alone = spec.model_copy(update={"metrics": ("perplexity", "kl_divergence")})
    floats = evaluate(EvaluationJob(model, alone, logprobs, writes_reference=True), lambda *told: None)
    assert floats["loaded_by"] == "transformers"
    items = floats["samples"]["items"]
    found = evaluate(EvaluationJob(exported, spec, logprobs, float_samples=items), lambda *told: None)
    decoder = spec_of(tmp_path, loader="reference", metrics=["ppl", "kl", "top1"])
    expected = evaluate(EvaluationJob(exported, decoder, logprobs, float_samples=items), lambda *told: None)
    (options,) = loaded
    assert (options.dtype, options.context_length, options.batch) == (None, 80, 3)
    assert found["loaded_by"] == "vllm"
    assert found["metrics"] == expected["metrics"]
    assert found["samples"]["items"] == expected["samples"]["items"]
    assert found["environment"]["vllm"] == "0.0.1"
    assert found["environment"]["settings"]["VLLM_CPU_INT4_W4A8"] == "0"
    assert found["notes"] == ["vllm was given 1 tensors that it did not use: passed"]
    table = plain(figure_table(found, "a file"))
    assert re.search(r"speed, prefill +[\d.e+]+ tokens/s", table)
    assert re.search(r"speed, decode of 3 rows +[\d.e+]+ tokens/s", table)
    assert found["memory"]["weights_bytes"] > 0
    assert found["memory"]["phases"]["prefill"]["peak_bytes"] > 0
    assert found["memory"]["baseline_bytes"] is None
    (batch,) = found["speed"]["batches"]
    assert batch["size"] == 3
    assert batch["prefill_tokens_per_second"] > 0
    assert batch["decode_tokens_per_second"] > 0


def test_the_command_hands_on_the_interpreter_and_the_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def scored(checkpoint: str, **keys: Any) -> dict[str, Any]:
        given.update(keys)
        return {}

    monkeypatch.setattr(quantkit, "evaluate", scored)
    options = ["--runtime", "vllm", "--python", "vllm-env/bin/python", "--batch-size", "1", "--batch-size", "8"]
    done = CliRunner().invoke(app, ["evaluate", "out", *options, "--json"])
    assert done.exit_code == 0, done.output
    assert (given["loader"], given["python"], given["batch_sizes"]) == ("vllm", "vllm-env/bin/python", [1, 8])


@pytest.mark.parametrize("loader", ["transformers", "vllm"])
def test_one_row_needs_no_batches(served: LoadedModel, decoded: LoadedModel, loader: str) -> None:
    model = served if loader == "vllm" else decoded
    assert "batches" not in measure_speed(model, IDS)


def test_transformers_takes_batches_and_who_does_not_says_so(decoded: LoadedModel) -> None:
    two, five = measure_speed(decoded, IDS, (1, 2, 5))["batches"]
    assert (two["size"], five["size"]) == (2, 5)
    assert five["decode_tokens_per_second"] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(decoded), "throughput", LoadedModel.throughput)
        (batch,) = measure_speed(decoded, IDS, (2,))["batches"]
    assert batch == {"size": 2, "missing": "its runtime takes one row at a time, as quantkit runs it"}

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded, "throughput", full)
        (batch,) = measure_speed(decoded, IDS, (64,))["batches"]
    assert batch == {"size": 64, "missing": "cpu has not enough memory for so many rows"}


# A run


@pytest.fixture(scope="module")
def told(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a run whose files are served too, scored in this process."""

    folder = tmp_path_factory.mktemp("run")
    (folder / "tide.txt").write_text(TEXT, encoding="utf-8")
    recipe = {
        "name": "served",
        "model": {"source": str(model)},
        "variants": [
            {"name": "int4", "method": "rtn", "group_size": 32},
            {"name": "hqq", "method": "rtn", "format": "hqq", "group_size": 32},
        ],
        "evaluation": {
            "texts": str(folder / "tide.txt"),
            "context_length": 64,
            "device": "cpu",
            "loader": "reference",
            "samples": False,
            "metrics": ["perplexity", "kl_divergence", "top1_agreement", "memory", "speed"],
            "served": {"runtime": "vllm", "batch_sizes": [1, 2]},
        },
        "report": {"folder": str(folder / "out")},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.evaluation.stage.run_job", score_here)
        before = quantkit.plan(recipe)["time"]["stages"]
        quantkit.run(recipe)
    left = quantkit.plan(recipe)["time"]["stages"]
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    return {**report, "folder": folder / "out", "before": before, "left": left}


def test_a_plan_has_the_stages_of_serving(told: dict[str, Any]) -> None:
    before, left = ([each["stage"] for each in told[key] if "serves" in each["stage"]] for key in ("before", "left"))
    assert before == [f"evaluate: {name} as vllm serves it" for name in ("baseline", "int4", "hqq")]
    assert left == ["evaluate: hqq as vllm serves it"]


def test_a_report_says_what_the_served_model_loses_beside_the_reference_decoder(told: dict[str, Any]) -> None:
    int4, hqq = told["variants"]
    assert int4["loaded_by"] == "reference"
    assert int4["served"]["by"] == "vllm"
    assert int4["served"]["metrics"] == int4["metrics"]
    assert [each["size"] for each in int4["served"]["speed"]["batches"]] == [2]
    assert told["baseline"]["served"]["metrics"]["kl_divergence"]["tide"]["mean"] < 1e-6
    assert hqq["status"] == "ok"
    assert "vLLM does not load hqq files" in hqq["served"]["missing"]
    for file in ("report.md", "report.html"):
        page = (told["folder"] / file).read_text(encoding="utf-8")
        assert "As served" in page
        assert "0.0.1 in float32 on cpu" in page
        assert "KL as served" in page
        assert "Decode, 2 rows" in page
        assert "vLLM does not load hqq files" in page
    card = (told["folder"] / "variants" / "int4" / "README.md").read_text(encoding="utf-8")
    assert "As served by vllm 0.0.1 in float32 on cpu" in card
    assert "- 2 rows: prefill " in card
    assert "As served" not in (told["folder"] / "variants" / "hqq" / "README.md").read_text(encoding="utf-8")


def test_tables_of_what_is_served(told: dict[str, Any]) -> None:
    found = build_served({**told, "variants": told["variants"][:1]})
    assert found is not None
    losses, speed = found.tables
    assert losses.header[:4] == ["Variant", "Scored by", "KL", "KL as served"]
    assert losses.rows[1][:2] == ["int4", "reference decoder"]
    assert losses.rows[1][2] == losses.rows[1][3]
    assert losses.rows[0][2] == ABSENT
    assert speed.header[2:] == ["Prefill, 1 row", "Decode, 1 row", "Prefill, 2 rows", "Decode, 2 rows"]
    row = dict(told["variants"][0])
    accuracy = {"task.acc": {"value": 0.5, "stderr": 0.1, "samples": 25}}
    row["metrics"] = {**row["metrics"], "tasks": accuracy}
    row["served"] = {**row["served"], "metrics": {"tasks": accuracy}, "speed": None}
    one = build_served({**told, "variants": [row], "baseline": None})
    assert one is not None
    assert [table.rows for table in one.tables] == [[["task.acc", "int4", "0.500 ± 0.100", "0.500 ± 0.100"]]]
    assert build_served({**told, "variants": [], "baseline": None}) is None


def test_serving_is_asked_for_in_short_or_at_length(tmp_path: Path) -> None:
    assert spec_of(tmp_path).as_served is None
    assert spec_of(tmp_path, served=False).as_served is None
    shorts: tuple[Any, ...] = ("vLLM", True, {})
    for given in shorts:
        found = spec_of(tmp_path, served=given, dtype="float16", loader="reference").as_served
        assert found is not None
        assert (found.loader, found.dtype, found.served, found.samples) == ("vllm", "auto", None, None)
    plain, asked = (evaluation_identity(spec_of(tmp_path, **keys)) for keys in ({}, {"served": True}))
    assert plain == asked
    with pytest.raises(RecipeError, match="'transformers' is no runtime with an interpreter of its own"):
        spec_of(tmp_path, served="transformers")
    with pytest.raises(RecipeError, match=r"evaluation\.served: there is no interpreter nowhere"):
        check_served(spec_of(tmp_path, served={"python": "nowhere"}))
    with pytest.raises(RecipeError, match="'served' is for recipes"):
        quantkit.evaluate(tmp_path, served=True)


# What goes wrong


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "load",
            r"vllm cannot load the check.*: ValueError: 1 validation error Unknown quantization method: made-up",
        ),
        (
            "memory",
            r"vllm cannot load the check.*: RuntimeError: .*allocate memory \(free some memory.*VLLM_CPU_KVCACHE_SPACE",
        ),
        (
            "kill",
            r"asked to load the checkpoint and ended \(SIGKILL.*most likely ran out of memory.*context_length",
        ),
    ],
)
def test_a_checkpoint_that_is_not_served_is_one_line(tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as failed:
        RUNTIMES.get("vllm").load(failing(tmp_path, how), LoadOptions())
    assert "\n" not in str(failed.value)


def test_a_process_that_dies_while_it_works_is_told(tmp_path: Path) -> None:
    found = RUNTIMES.get("vllm").load(failing(tmp_path, "kill later"), LoadOptions())
    for _ in range(2):  # whoever asks later is told the same
        with pytest.raises(EvaluationError, match=r"vllm was asked to give logits and ended \(SIGKILL.*free some mem"):
            found.logits(IDS)
    found.close()


def test_a_process_that_dies_and_leaves_another_is_told(tmp_path: Path) -> None:
    """The other one holds its standard output, which so does not end."""
    found = RUNTIMES.get("vllm").load(failing(tmp_path, "fork and kill later"), LoadOptions())
    with pytest.raises(EvaluationError, match=r"vllm was asked to give logits and ended \(SIGKILL"):
        found.logits(IDS)


def test_a_process_that_hangs_is_ended_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = RUNTIMES.get("vllm").load(failing(tmp_path, "hang later"), LoadOptions())
    monkeypatch.setattr(_distant, "SILENCE", 0.5)
    with pytest.raises(EvaluationError, match=r"asked to give logits and said nothing for 0 minutes.*loader auto or"):
        found.logits(IDS)
    assert found.process is not None
    assert not psutil.pid_exists(found.process)
    with pytest.raises(EvaluationError, match="said nothing"):
        found.logits(IDS)


def test_half_an_answer_is_the_end(tmp_path: Path) -> None:
    code = "import sys; sys.stdin.readline(); print('{\"voc', end='', flush=True)"
    server = _distant.Server("made-up", [sys.executable, "-c", code], dict(os.environ))
    with pytest.raises(EvaluationError, match=r"made-up was asked to load the checkpoint and ended \(exit code 0\)"):
        server.ask("load")
    assert not server.folder.exists()
    with pytest.raises(EvaluationError, match=r"made-up cannot be started by .*nowhere: No such file"):
        _distant.Server("made-up", [str(tmp_path / "nowhere")], dict(os.environ))


def test_a_process_takes_its_files_away_where_its_parent_was_killed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "logits.safetensors").write_bytes(b"large")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "kept")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdin is not None
        child.stdin.close()  # as the system does it for a process that ends
        child.wait(60)
    assert not (tmp_path / "kept").exists()


def test_a_script_that_prints_and_dies_leaves_its_last_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("print('hello')\nraise ImportError('libcudart.so.13 is not there')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(EvaluationError, match=r"vllm cannot load .*: ImportError: libcudart\.so\.13 is not there"):
            RUNTIMES.get("vllm").load(model, LoadOptions())


def test_who_is_served_by_vllm(model: Path, exported: Path, tmp_path: Path) -> None:
    assert choose_runtime(exported, "vllm").name == "vllm"
    assert choose_runtime(model, "vllm").name == "vllm"
    spec = spec_of(tmp_path, loader="vllm")
    assert EvaluationJob(model, spec).is_served
    assert not EvaluationJob(model, spec, writes_reference=True).is_served
    other = quantkit.quantize(model, out=tmp_path / "hqq", method="rtn", group_size=32, format="hqq")
    with pytest.raises(EvaluationError, match=r"hqq is not served: vLLM does not load hqq files.*loader auto or ref"):
        choose_runtime(other, "vllm")
    edit_json(other / "manifest.json", lambda manifest: manifest.update(format="made-up"))
    assert choose_runtime(other, "vllm").name == "vllm"
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(EvaluationError, match=r"model\.gguf is not served: quantkit gives vllm no GGUF files"):
        choose_runtime(tmp_path / "model.gguf", "vllm")


def test_the_interpreter_is_looked_for_before_any_work(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, loader="vllm", python=str(tmp_path / "python"))
    with pytest.raises(RecipeError, match=r"evaluation\.loader: there is no interpreter .*python"):
        check_loader(spec)
    check_loader(spec_of(tmp_path, loader="vllm"))
    with pytest.raises(RecipeError, match="'python' is the interpreter of a runtime that has its own, and loader is"):
        spec_of(tmp_path, python="python3")
    with pytest.raises(QuantkitError, match="there is no interpreter nowhere"):
        quantkit.verify(tmp_path, runtime="vllm", python="nowhere")
    (tmp_path / "python").write_text("no program\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(RecipeError, match=r"python is no interpreter that can be run: .*Exec format error"):
        check_loader(spec)
    (tmp_path / "python").write_text("#!/bin/sh\necho broken libraries >&2\nexit 3\n")
    with pytest.raises(RecipeError, match=r"python is no interpreter that can be run: broken libraries"):
        check_loader(spec)


def test_the_interpreter_may_be_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of another folder is started by it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    checkpoint = failing(tmp_path, "nothing")
    monkeypatch.chdir(tmp_path)
    RUNTIMES.get("vllm").load(checkpoint, LoadOptions(python="bin/python")).close()


def test_figures_of_another_version_are_not_reused(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, loader="vllm")
    assert computed(spec)["vllm"] == "0.0.1"
    assert "vllm" not in computed(spec_of(tmp_path))
    before = computed(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_INT4_W4A8", "1")
        assert computed(spec) != before
    named = spec_of(tmp_path, loader="vllm", python=sys.executable)
    assert evaluation_identity(named) == evaluation_identity(spec)


def test_a_checkpoint_is_verified_by_the_same_process(
    exported: Path, loaded: list[LoadOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "carry_out", perform)
    given: dict[str, Any] = {"dtype": "float32", "device": "cpu", "prompts": ("The tide went out", "def f(x):")}
    verdict = verdicts.verify(exported, "vllm", python=sys.executable, **given)
    assert loaded[0].python == sys.executable
    assert verdict["passed"], verdict["reason"]
    assert verdict["figures"]["kl"] < 1e-9
    assert verdict["versions"]["vllm"] == "0.0.1"
    assert [trap["name"] for trap in verdict["traps"]] == ["dropped tensors"]
    assert verdict["generated"]
    assert verdict["peak_bytes"] > 0
