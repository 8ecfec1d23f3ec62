"""A rehearsal runs a few blocks with one batch through everything, and tells what the whole run will take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.cli.tables import rehearsal_notes, rehearsal_table
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import OutputError
from quantkit.evaluation import stage as scores
from quantkit.methods.rtn import Rtn
from quantkit.pipeline.rehearsal import cut
from quantkit.recipe import Recipe
from quantkit.system.artifacts import read_json
from quantkit.system.memory_bounds import MemoryBounds
from tests.runs import make_recipe, score_here, write_records
from tests.tiny import make_model

BLOCKS = 5
VARIANTS: list[dict[str, Any]] = [
    {"name": "plain", "method": "rtn", "bits": 8},
    {"name": "near", "method": "gptq", "bits": 4},
    {"name": "far", "method": "rtn", "bits": 4, "overrides": {r"layers\.4\.": {"bits": 8}}},
    {"name": "better", "recover": "plain", "steps": 50},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "qwen2", num_hidden_layers=BLOCKS, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def recipe(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("rehearsal")
    extra = {"texts": ["prose"], "context_length": 32, "max_tokens": 4096, "device": "cpu", "samples": 2}
    return make_recipe(model, write_records(folder / "records.jsonl"), folder / "run", VARIANTS, evaluation=extra)


def test_the_first_blocks_are_a_model(model: Path, tmp_path: Path) -> None:
    small = cut(model, tmp_path / "small", 2)
    assert len(Skeleton(small).segments) == 2
    assert read_json(small / "config.json")["num_hidden_layers"] == 2
    names = CheckpointReader(small).names()
    assert set(names) == {name for name in CheckpointReader(model).names() if ".layers." not in name or name in names}
    assert any(name.startswith("model.layers.1.") for name in names)
    assert not any(name.startswith("model.layers.2.") for name in names)


def test_a_rehearsal_tells_what_the_whole_run_will_take(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "run_job", score_here)
    found = quantkit.plan(recipe, rehearse=True)
    told = found["rehearsal"]
    assert (told["blocks"], told["of_blocks"]) == (2, BLOCKS)
    assert told["failures"] == {}
    assert told["left_out"] == ["far"]  # it names a block that is not there
    stages = {each["stage"]: each for each in told["stages"]}
    wanted = {each["stage"]: each for each in found["stages"] if "far" not in each["stage"]}
    assert set(wanted) - {"quantize: plain, far"} <= set(stages) | {"quantize: plain"}
    near = stages["quantize: near"]
    assert near["measured_bytes"] > 0
    assert near["whole_bytes"] == round(wanted["quantize: near"]["bytes"] / near["ratio"])
    assert near["whole_seconds"] > 0
    assert stages["evaluate: better"]["seconds"] > 0
    assert rehearsal_table(told).row_count == len(told["stages"])
    assert list(rehearsal_notes(told)) == ["not rehearsed: far"]
    assert not recipe.folder.exists()


def test_a_rehearsal_lies_where_the_user_says(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "run_job", score_here)
    disk = tmp_path / "not yet" / "there"
    bounds = {"max_memory": MemoryBounds({}, disk), "variants": recipe.variants[:1]}
    assert quantkit.plan(recipe.model_copy(update=bounds), rehearse=True)["rehearsal"]["stages"]
    assert list(disk.iterdir()) == []
    (tmp_path / "file").touch()
    bounds["max_memory"] = MemoryBounds({}, tmp_path / "file")
    with pytest.raises(OutputError, match="a part of the path is a file"):
        quantkit.plan(recipe.model_copy(update=bounds), rehearse=True)


def test_what_would_fail_in_hour_three_is_told_before(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "run_job", score_here)

    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no grid")

    monkeypatch.setattr(Rtn, "quantize", broken)
    small = recipe.model_copy(update={"variants": recipe.variants[:1]})
    told = quantkit.plan(small, rehearse=True)["rehearsal"]
    assert "no grid" in told["failures"]["plain"]
    assert any("plain would fail" in note for note in rehearsal_notes(told))
