"""Texts that are scored in rounds until what is compared is known as precisely as the recipe asks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.errors import EvaluationError
from quantkit.evaluation.positions import read_positions
from quantkit.evaluation.rounds import FIRST, first_reach, next_reach
from quantkit.evaluation.texts import Windows
from quantkit.gates.precision import relative_error
from quantkit.pipeline import run
from quantkit.recipe import EvaluationSpec, Recipe
from quantkit.system.artifacts import read_json
from tests.runs import Notebook, make_recipe, score_here, write_records
from tests.tiny import make_model

VARIANTS: list[dict[str, Any]] = [
    {"name": "int4", "method": "rtn", "bits": 4},
    {"name": "int3", "method": "rtn", "bits": 3},
]
CONTEXT = 16
SCORING: dict[str, Any] = {
    "texts": ["prose", "answers"],
    "context_length": CONTEXT,
    "max_tokens": 3 * FIRST * CONTEXT,
    "metrics": ["perplexity", "kl_divergence", "top1_agreement"],
    "device": "cpu",
    "samples": 1,
}


def figures(kl: float, stderr: float, apart: list[float]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file's and the float model's figures on a text."""
    float_nll = [3.0, 5.0, 4.0, 6.0][: len(apart)]
    own = [one + other for one, other in zip(float_nll, apart, strict=True)]

    def row(nll: list[float]) -> dict[str, Any]:
        about = {"nll_by_window": nll, "nll_count": 10 * len(nll), "windows": len(nll)}
        return {"metrics": {"perplexity": {"prose": 9.0}}, "texts": {"prose": about}}

    file = row(own)
    file["metrics"]["kl_divergence"] = {"prose": {"mean": kl, "stderr": stderr}}
    return file, row(float_nll)


def test_the_error_is_the_larger_one_of_divergence_and_perplexity() -> None:
    file, floats = figures(0.2, 0.01, [0.5, 0.5, 0.5, 0.5])
    assert relative_error(file, floats, "prose") == pytest.approx(0.05)
    file, floats = figures(0.2, 0.0, [0.0, 2.0, 4.0, 2.0])
    each = torch.tensor([0.0, 0.2, 0.4, 0.2], dtype=torch.float64)  # nats a token
    assert relative_error(file, floats, "prose") == pytest.approx((each.std() / math.sqrt(4)).item())
    same, floats = figures(0.0, 0.0, [0.0, 0.0])
    assert relative_error(same, floats, "prose") == 0.0
    one, floats = figures(0.2, 0.01, [1.0])
    del one["metrics"]["kl_divergence"]
    assert relative_error(one, floats, "prose") is None


def test_texts_go_on_where_a_file_is_not_precise_and_no_further_than_they_reach() -> None:
    spec = EvaluationSpec.model_validate(
        {"texts": ["prose"], "context_length": 16, "max_tokens": 100, "precision": 0.06}
    )
    file, floats = figures(0.2, 0.01, [0.5, 0.5, 0.5, 0.5])
    other, _ = figures(0.2, 0.02, [0.5, 0.5, 0.5, 0.5])
    assert first_reach(EvaluationSpec()) == {}
    assert first_reach(spec) == {"prose": 100}
    assert next_reach(spec, {"prose": 64}, floats, [file]) is None
    assert next_reach(spec, {"prose": 64}, floats, [file, other]) == {"prose": 100}
    assert next_reach(spec, {"prose": 100}, floats, [other]) is None
    assert next_reach(spec, {"prose": 96}, floats, [other]) is None  # the text has ended: 4 windows and not 6


def test_a_precision_needs_something_that_is_compared() -> None:
    with pytest.raises(ValueError, match="'precision' is of perplexity or kl_divergence"):
        EvaluationSpec(metrics=("memory",), precision=0.1)
    with pytest.raises(ValueError, match="less than 1"):
        EvaluationSpec(precision=5)


def test_positions_of_another_text_are_refused(tmp_path: Path) -> None:
    text = Windows("prose", torch.ones(2, 4, dtype=torch.int64), 4, "none", 8, 0)
    assert read_positions(None, {"prose": text}) == {}
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_positions(tmp_path, {"prose": text})


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float model and records."""
    folder = tmp_path_factory.mktemp("precision")
    return make_model(folder / "model"), write_records(folder / "records.jsonl")


def recipe_of(parts: tuple[Path, Path], out: Path, variants: list[dict[str, Any]], **scoring: Any) -> Recipe:
    return make_recipe(*parts, out, variants, evaluation={**SCORING, **scoring})


@pytest.fixture(scope="module")
def precise(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Recipe]:
    """A run that asks for more than there is, so that it goes to the end of ``max_tokens`` in three rounds."""
    recipe = recipe_of(parts, tmp_path_factory.mktemp("runs") / "precise", VARIANTS, precision=0.0001)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.evaluation.stage.run_job", score_here)
        return run(recipe, Notebook()), recipe


def texts_of(row: dict[str, Any]) -> dict[str, Any]:
    return {"metrics": row["metrics"], "texts": row["texts"], "samples": row["samples"]}


def test_rounds_give_the_figures_of_a_single_one(
    precise: tuple[dict[str, Any], Recipe], parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.evaluation.stage.run_job", score_here)
    whole = run(recipe_of(parts, tmp_path / "whole", VARIANTS), Notebook())
    found, recipe = precise
    for one, other in zip(
        [found["baseline"], *found["variants"]], [whole["baseline"], *whole["variants"]], strict=True
    ):
        assert texts_of(one) == texts_of(other)
    page = (recipe.folder / "report.md").read_text()
    assert "Relative standard error asked for: 0.01%, within 384 tokens" in page
    assert "The largest one: " in page
    rounds = read_json(recipe.folder / "evaluations" / "int4" / "rounds.json")
    assert [each["reach"]["prose"] for each in rounds] == [128, 256, 384]


def test_a_run_that_is_finished_scores_nothing_again_and_a_new_variant_goes_the_same_way(
    precise: tuple[dict[str, Any], Recipe], parts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, recipe = precise
    scored = []

    def counted(job: Any, **options: Any) -> dict[str, Any]:
        scored.append((job.checkpoint.name, dict(job.reach)["prose"], job.known is not None))
        return score_here(job, **options)

    monkeypatch.setattr("quantkit.evaluation.stage.run_job", counted)
    again = run(recipe, Notebook())
    assert scored == []
    assert [texts_of(row) for row in again["variants"]] == [texts_of(row) for row in found["variants"]]
    more = [*VARIANTS, {"name": "int8", "method": "rtn", "bits": 8}]
    run(recipe_of(parts, recipe.folder, more, precision=0.0001), Notebook())
    assert scored == [("int8", 128, False), ("int8", 256, True), ("int8", 384, True)]


def test_a_text_that_is_precise_is_scored_no_further(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.evaluation.stage.run_job", score_here)
    told = Notebook()
    found = run(recipe_of(parts, tmp_path / "rough", VARIANTS[:1], precision=0.9), told)
    assert [found["variants"][0]["texts"][text]["windows"] for text in ("prose", "answers")] == [FIRST, FIRST]
    assert not any("not precise" in note for note in told.notes)


def test_a_file_that_cannot_be_scored_on_fails_alone(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(job: Any, **options: Any) -> dict[str, Any]:
        if job.known is not None and job.checkpoint.name == "int4":
            raise EvaluationError("the disk went away", "bring it back")
        return score_here(job, **options)

    monkeypatch.setattr("quantkit.evaluation.stage.run_job", failing)
    found = run(recipe_of(parts, tmp_path / "failing", VARIANTS, precision=0.0001, max_tokens=192), Notebook())
    assert [row["status"] for row in found["variants"]] == ["failed", "ok"]
    assert found["variants"][1]["texts"]["prose"]["windows"] == 12


def test_a_model_that_is_read_a_block_at_a_time_goes_on_too(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.evaluation.stage.run_job", score_here)
    keys: dict[str, Any] = {"loader": "streamed", "texts": ["prose"], "max_tokens": 192}
    rounds = run(recipe_of(parts, tmp_path / "rounds", VARIANTS[:1], precision=0.0001, **keys), Notebook())
    whole = run(recipe_of(parts, tmp_path / "whole", VARIANTS[:1], **keys), Notebook())
    for one, other in zip(*([each["baseline"], *each["variants"]] for each in (rounds, whole)), strict=True):
        assert (one["metrics"], one["texts"]) == (other["metrics"], other["texts"])
        assert one["loaded_by"] == "streamed"
