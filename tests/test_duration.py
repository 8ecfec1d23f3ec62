"""How long a run will take: told by plan and at the start of a run, of the stages that there are, and honestly."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import quantkit
from quantkit.cli.tables import plan_notes, time_words
from quantkit.evaluation import stage as scores
from quantkit.pipeline import machine_rates
from quantkit.pipeline.machine_rates import rates, solving_seconds
from quantkit.pipeline.recorded import recorded_run
from quantkit.pipeline.work_seconds import END, START
from quantkit.recipe import Recipe, VariantSpec
from quantkit.system.artifacts import read_json
from quantkit.system.pace import Ahead
from tests.runs import Notebook, make_recipe, score_here, write_records
from tests.tiny import make_model

VARIANTS: list[dict[str, Any]] = [
    {"name": "plain", "method": "rtn", "bits": 8},
    {"name": "near", "method": "gptq", "bits": 4},
    {"name": "smooth", "method": "awq", "bits": 4},
]
EXTRA = {
    "texts": ["prose"], "context_length": 32, "max_tokens": 96, "device": "cpu", "metrics": ["perplexity", "speed"],
    "answers": {"samples": 2, "max_new_tokens": 4, "metrics": ["exact_match"]}, "samples": 2,
}  # fmt: skip


class Listener(Notebook):
    """Also keeps what is to come."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead: list[Ahead] = []

    def expect(self, ahead: Sequence[Ahead]) -> None:
        self.ahead = list(ahead)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Listener, dict[str, Any], dict[str, Any]]:
    """A recipe, what its run told, and its plan before and after."""
    folder = tmp_path_factory.mktemp("duration")
    model, records = make_model(folder / "model", dtype=torch.bfloat16), write_records(folder / "records.jsonl")
    recipe = make_recipe(model, records, folder / "runs" / "run", VARIANTS, evaluation=EXTRA)
    before, told = quantkit.plan(recipe), Listener()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "run_job", score_here)
        recorded_run(recipe, told)
    return recipe, told, before, quantkit.plan(recipe)


def test_what_is_expected_is_what_comes(whole: tuple[Recipe, Listener, dict[str, Any], dict[str, Any]]) -> None:
    _, told, before, _ = whole
    expected = list(dict.fromkeys(step.stage for step in told.ahead))
    assert expected == [stage for stage in told.stages if stage.partition(":")[0] not in ("source", "calibration")]
    assert {step.step for step in told.ahead} - {""} <= {name for name, _, _ in told.steps}
    assert all(0 < step.seconds < 600 for step in told.ahead)
    assert [each["stage"] for each in before["time"]["stages"]] == expected


def test_a_report_has_what_stages_took_beside_what_was_expected(
    whole: tuple[Recipe, Listener, dict[str, Any], dict[str, Any]],
) -> None:
    recipe, _, before, _ = whole
    told = {each["stage"]: each for each in read_json(recipe.folder / "report.json")["stages"]}
    assert {each["stage"] for each in before["stages"]} <= set(told)
    for stage in before["stages"]:
        found = told[stage["stage"]]
        assert found["estimated_bytes"] == pytest.approx(stage["bytes"], rel=0.02)
        assert found["how"] == stage["how"]
        assert found["measured_bytes"] > 0
        assert found["ratio"] == pytest.approx(found["estimated_bytes"] / found["measured_bytes"])
    assert told["calibration"]["measured_bytes"] >= 0
    assert told["calibration"]["estimated_bytes"] is None


def test_a_plan_tells_within_what_it_is_right_and_from_what(
    whole: tuple[Recipe, Listener, dict[str, Any], dict[str, Any]],
) -> None:
    _, _, before, after = whole
    time = before["time"]
    assert time["low"] == pytest.approx(time["seconds"] / 3)
    assert time["high"] == pytest.approx(time["seconds"] * 3)
    assert "a short measurement on this machine" in time["by"]
    assert "GFLOP/s in" in time["by"]
    assert "MB/s of disk" in time["by"]
    assert time_words(time) in list(plan_notes(before))
    assert after["time"]["stages"] == []
    assert "nothing is left to do" in next(iter(plan_notes(after)))


def test_an_earlier_run_on_this_machine_counts_more_than_a_measurement(
    whole: tuple[Recipe, Listener, dict[str, Any], dict[str, Any]],
) -> None:
    recipe, _, _, _ = whole
    shutil.move(recipe.folder, recipe.folder.with_name("aside"))
    try:
        time = quantkit.plan(recipe)["time"]
    finally:
        shutil.rmtree(recipe.folder, ignore_errors=True)
        shutil.move(recipe.folder.with_name("aside"), recipe.folder)
    by = {stage["stage"]: stage for stage in time["stages"]}
    report = quantkit.report.load(recipe.folder)
    scoring = report["variants"][1]["seconds"]["evaluate"] + START + END  # and the process around it
    assert by["evaluate: near"]["seconds"] == pytest.approx(scoring)
    assert by["quantize: near"]["seconds"] == pytest.approx(report["variants"][1]["seconds"]["quantize"])
    assert {each["by"] for each in by.values()} >= {"run 1 of the history"}
    changed = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"max_tokens": 64})})
    shutil.move(recipe.folder, recipe.folder.with_name("aside"))
    try:
        again = quantkit.plan(changed)["time"]
    finally:
        shutil.move(recipe.folder.with_name("aside"), recipe.folder)
    told = {stage["stage"]: stage["by"] for stage in again["stages"]}
    assert "measurement" in told["evaluate: near"]
    assert told["quantize: near"] == "run 1 of the history"


def test_solving_grows_with_rows_and_with_what_a_method_factorizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rates, "_tried", lambda key, variant, rows, columns, device: 1.0)
    plain = VariantSpec.model_validate({"name": "a", "method": "rtn", "group_size": 64})
    factorized = VariantSpec.model_validate({"name": "a", "method": "gptq", "group_size": 64})
    one, wide = [(256, 512)], [(256, 2048)]
    assert [solving_seconds(plain, shapes, "cpu") for shapes in (one, wide)] == [1.0, 4.0]
    assert [solving_seconds(factorized, shapes, "cpu") for shapes in (one, wide)] == [1.0, 16.0]


def test_a_method_that_breaks_on_a_trial_has_no_time_and_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> float:
        raise ZeroDivisionError

    monkeypatch.setattr(machine_rates, "_solved", broken)
    variant = VariantSpec.model_validate({"name": "a", "method": "rtn", "group_size": 16})
    assert solving_seconds(variant, [(48, 16)], "cpu") is None


def test_rates_are_of_the_device_and_the_dtype() -> None:
    found = rates("cpu", torch.float32, 64, 128)
    assert (found.device, found.dtype) == ("cpu", "float32")
    assert found.products > 1e6
    assert found.nbytes > 1e6
    assert rates("cpu", torch.bfloat16, 64, 128).dtype == "bfloat16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rates_of_a_gpu_are_measured_there() -> None:
    found = rates("cuda:0", torch.bfloat16, 4096, 4096)
    assert found.products > rates("cpu", torch.float32, 4096, 4096).products
