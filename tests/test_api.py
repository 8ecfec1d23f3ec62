from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit import evaluation
from quantkit.errors import EvaluationError, OutputError, QuantkitError, RecipeError
from quantkit.methods import METHODS
from quantkit.recipe import CalibrationSpec, VariantSpec
from quantkit.schemes import Fp8Scheme, IntScheme
from quantkit.system.artifacts import read_json
from quantkit.system.validation import parse_section
from tests.runs import (
    Notebook,
    decoded_model,
    hidden_names,
    load_whole,
    logits,
    make_recipe,
    recipe_data,
    score_here,
    write_recipe,
)

QUICK: dict[str, Any] = {"texts": ["prose"], "context_length": 32, "max_tokens": 64}


@pytest.fixture(scope="module")
def checkpoint(model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantkit.quantize(
        model,
        out=tmp_path_factory.mktemp("out") / "gptq",
        group_size=32,
        calibration={"dataset": str(records), "samples": 8, "max_length": 48},
        overrides={"down_proj": {"bits": 8}},
        damping=0.05,
    )


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "run_job", score_here)


def test_quantize_gives_a_checkpoint_that_loads(model: Path, checkpoint: Path) -> None:
    keys = {"name": "variant", "group_size": 32, "overrides": {"down_proj": {"bits": 8}}}
    wanted = decoded_model(model, checkpoint, parse_section(VariantSpec, keys, "test"))
    torch.testing.assert_close(logits(load_whole(checkpoint)), logits(wanted), rtol=1e-4, atol=1e-4)
    assert read_json(checkpoint / "stage.json")["made_from"]["variant"]["options"]["damping"] == 0.05
    assert hidden_names(checkpoint.parent) == []
    assert [path.name for path in checkpoint.parent.iterdir()] == ["gptq"]


def test_quantize_tells_an_observer_and_needs_no_data_for_rtn(model: Path, tmp_path: Path) -> None:
    notebook = Notebook()
    out = quantkit.quantize(model, out=tmp_path / "deep" / "out", method="rtn", group_size=32, observer=notebook)
    assert out == tmp_path / "deep" / "out"
    assert notebook.stages == [f"source: {model}", "quantize: rtn"]
    assert notebook.steps[-1] == ("block", 2, 2)


def test_quantize_takes_a_scheme_with_its_keys(model: Path, tmp_path: Path) -> None:
    out = quantkit.quantize(model, out=tmp_path / "out", method="rtn", scheme="fp8", granularity="tensor")
    layers = read_json(out / "manifest.json")["layers"]
    assert set(map(str, layers.values())) == {str(Fp8Scheme("tensor").to_json())}


def test_quantize_without_a_scheme_takes_the_defaults_of_integers(model: Path, tmp_path: Path) -> None:
    out = quantkit.quantize(model, out=tmp_path / "out", method="rtn")
    assert read_json(out / "manifest.json")["layers"]["model.layers.0.mlp.up_proj"] == IntScheme().to_json()


def test_quantize_tells_an_observer_the_warnings_of_a_method(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS.get("rtn"), "warnings", staticmethod(lambda _: ("too few",)), raising=False)
    notebook = Notebook()
    quantkit.quantize(model, out=tmp_path / "out", method="rtn", observer=notebook)
    assert notebook.notes == ["warning: too few"]


def test_quantize_takes_a_calibration_section_as_such(model: Path, records: Path, tmp_path: Path) -> None:
    spec = CalibrationSpec(dataset=str(records), samples=4, max_length=32, inputs="float")
    out = quantkit.quantize(model, out=tmp_path / "out", group_size=32, calibration=spec)
    assert read_json(out / "manifest.json")["inputs"] == "float"


def test_evaluate_without_a_reference_gives_what_needs_none(checkpoint: Path, in_process: None) -> None:
    result = quantkit.evaluate(checkpoint, metrics=["perplexity", "kl_divergence", "memory"], **QUICK)
    assert list(result["metrics"]) == ["perplexity"]
    assert result["metrics"]["perplexity"]["prose"] > 1
    assert result["memory"]["weights_bytes"] > 0


def test_evaluate_with_a_reference_gives_the_divergence(model: Path, checkpoint: Path, in_process: None) -> None:
    metrics = ["perplexity", "kl_divergence", "top1_agreement"]
    result = quantkit.evaluate(checkpoint, reference=model, metrics=metrics, **QUICK)
    assert result["metrics"]["kl_divergence"]["prose"]["mean"] > 0
    assert 0 <= result["metrics"]["top1_agreement"]["prose"] <= 1
    same = quantkit.evaluate(model, reference=model, metrics=metrics, **QUICK)
    assert same["metrics"]["kl_divergence"]["prose"]["mean"] == pytest.approx(0, abs=1e-6)
    assert same["metrics"]["top1_agreement"]["prose"] == 1


def test_a_reference_is_not_run_where_nothing_compares(checkpoint: Path, tmp_path: Path, in_process: None) -> None:
    notebook = Notebook()
    quantkit.evaluate(checkpoint, reference=tmp_path / "none", metrics=["perplexity"], observer=notebook, **QUICK)
    assert notebook.stages == [f"evaluate: {checkpoint}"]


def test_a_log_that_an_error_names_stays_and_any_other_goes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def died(job: Any, *, log: Path, on_progress: Any) -> Any:
        log.write_text("what happened")
        raise EvaluationError("scoring died", f"the whole message is in {log}")

    monkeypatch.setattr(evaluation, "run_job", died)
    with pytest.raises(EvaluationError) as caught:
        quantkit.evaluate(checkpoint, metrics=["perplexity"], **QUICK)
    log = Path(caught.value.remedy.removeprefix("the whole message is in "))
    assert log.read_text() == "what happened"
    log.unlink()
    log.parent.rmdir()

    def refused(job: Any, *, log: Path, on_progress: Any) -> Any:
        log.write_text("x")
        raise EvaluationError("too long", "make it shorter")

    monkeypatch.setattr(evaluation, "run_job", refused)
    with pytest.raises(EvaluationError, match="too long"):
        quantkit.evaluate(checkpoint, metrics=["perplexity"], **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_run_and_plan_take_a_recipe_or_its_path(
    model: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.evaluation.stage.run_job", score_here)
    data = recipe_data(model, records, tmp_path / "run", [{"name": "rtn", "method": "rtn"}])
    path = write_recipe(tmp_path / "demo.yaml", data)
    assert quantkit.plan(str(path))["variants"][0]["state"] == "to do"
    assert quantkit.run(path)["status"] == "ok"
    recipe = make_recipe(model, records, tmp_path / "run", [{"name": "rtn", "method": "rtn"}])
    assert quantkit.plan(recipe)["variants"][0]["state"] == "finished"


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a keyword": ({"bitz": 4}, r"^quantize: unknown key 'bitz' \(did you mean 'bits'\?"),
    "bits": ({"bits": 9}, r"^quantize: bits 9 is not a width"),
    "a scheme": ({"scheme": "nf5"}, r"^quantize: scheme: unknown scheme 'nf5' \(did you mean 'nf4'"),
    "a key of another scheme": ({"scheme": "fp8"}, r"^quantize: scheme fp8 does not take 'group_size' \(it takes gran"),
    "a type": ({"bits": "4"}, r"^quantize: bits: must be a valid integer, not '4'"),
    "a method": ({"method": "gtpq"}, r"^quantize: method: unknown method 'gtpq' \(did you mean 'gptq'"),
    "a calibration key": ({"calibration": {"sampels": 4}}, r"^calibration: unknown key 'sampels' \(did you mean 'samp"),
    "a model": ({"model": "/no/such/model"}, r"^model.source: there is no /no/such/model"),
    "a data set": ({"calibration": "no/such.jsonl"}, r"no/such\.jsonl"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_clear_error(model: Path, tmp_path: Path, kind: str) -> None:
    keys, expected = MISTAKES[kind]
    with pytest.raises(QuantkitError, match=expected) as caught:
        quantkit.quantize(**{"model": model, "out": tmp_path / "out", "group_size": 32, **keys})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_of_evaluate(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^evaluation: unknown key 'contextlength' \(did you mean 'context_length'"):
        quantkit.evaluate(checkpoint, contextlength=32)
    with pytest.raises(EvaluationError, match=r"is not a checkpoint: it has no config\.json"):
        quantkit.evaluate(tmp_path)
    with pytest.raises(RecipeError, match=r"compare with a float model \(give reference=\)"):
        quantkit.evaluate(checkpoint, metrics=["kl_divergence"])


def test_a_folder_of_the_users_is_not_overwritten(model: Path) -> None:
    before = sorted(path.name for path in model.iterdir())
    with pytest.raises(OutputError, match="is the model that is read, which would be replaced"):
        quantkit.quantize(model, out=model, method="rtn", group_size=32)
    assert sorted(path.name for path in model.iterdir()) == before
