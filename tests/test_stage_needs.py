"""What the stages of a run take, told before: by the rules that they follow, and refused where bounds are too small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.cli.tables import stages_table
from quantkit.errors import RecipeError
from quantkit.estimation import anatomy_of
from quantkit.estimation.stages import Room, getting_by, scoring_need, sensitivity_need, walk_need
from quantkit.estimation.streaming import Scored
from quantkit.estimation.use import Use
from quantkit.estimation.weights import stored
from quantkit.pipeline import plan
from quantkit.recipe import Recipe, VariantSpec
from quantkit.recipe.evaluation import ServedSpec
from quantkit.system.validation import parse_section
from tests.runs import make_recipe, write_records
from tests.tiny import make_model

GIB = 1 << 30
VARIANTS: list[dict[str, Any]] = [
    {"name": "plain", "method": "rtn", "bits": 8},
    {"name": "near", "method": "gptq", "bits": 4},
    {"name": "better", "recover": "plain", "steps": 2},
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("needs")
    model, records = make_model(folder / "model", dtype=torch.bfloat16), write_records(folder / "records.jsonl")
    extra = {"texts": ["prose"], "context_length": 32, "max_tokens": 96, "device": "cpu"}
    found = make_recipe(model, records, folder / "run", VARIANTS, evaluation=extra)
    calibration = found.calibration.model_copy(update={"sensitivity": True})
    return found.model_copy(update={"calibration": calibration})


def test_a_plan_has_every_stage_that_computes(recipe: Recipe) -> None:
    found = quantkit.plan(recipe)
    stages = {each["stage"]: each for each in found["stages"]}
    assert list(stages) == [
        "baseline: the float model",
        "sensitivity",
        *(
            "quantize: plain",
            "evaluate: plain",
            "quantize: near",
            "evaluate: near",
            "recover: better",
            "evaluate: better",
        ),
    ]
    for each in stages.values():
        assert each["device"] == "cpu"
        assert each["bytes"] == sum(line["bytes"] for line in each["lines"]) > 0
        assert 0 < each["least_bytes"] <= each["bytes"]
        assert each["how"]
        assert each["process_bytes"] > 100 << 20  # Python with torch and transformers
    assert stages["quantize: near"]["how"] == "one pass"
    assert stages_table(found).row_count == len(stages)


def test_a_file_as_it_is_served_is_a_stage_of_its_own(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "preflight", lambda _: None)  # which looks for the server
    evaluation = recipe.evaluation.model_copy(update={"served": ServedSpec()})
    found = plan.forecast(recipe.model_copy(update={"evaluation": evaluation}))
    served = [each for each in found["stages"] if each["stage"].endswith("as vllm serves it")]
    assert len(served) == 1 + len(VARIANTS)
    assert {each["how"] for each in served} == {"by vllm"}
    assert {each["bytes"] for each in served} == {None}
    assert {each["stage"] for each in served} <= {each["stage"] for each in found["time"]["stages"]}


def test_bounds_that_nothing_fits_are_refused_with_the_smallest_that_does(recipe: Recipe) -> None:
    parsed = Recipe.parse(recipe.to_yaml() + "max_memory: {cpu: 20MiB}\n")
    with pytest.raises(RecipeError, match=r"takes \d+ MiB of cpu at the least, .* may have 20.00 MiB") as raised:
        quantkit.plan(parsed)
    wanted = raised.value.remedy.removeprefix("give cpu ").removesuffix(" or more")
    assert "\n" not in str(raised.value)
    roomier = f"{int(wanted.removesuffix('MiB')) + 200}MiB"  # the process itself grows meanwhile
    assert quantkit.plan(Recipe.parse(recipe.to_yaml() + f"max_memory: {{cpu: {roomier}}}\n"))["stages"]


# A 70B on one card


def large(**keys: Any) -> VariantSpec:
    return parse_section(VariantSpec, {"name": "v", "method": "gptq", "bits": 4, "group_size": 128, **keys}, "test")


@pytest.mark.parametrize(
    ("free", "words", "waits"),
    [(400, "one pass", False), (40, "each block anew for every group", False), (4, "in the CPU's memory", True)],
)
def test_less_memory_is_told_as_another_way(free: int, words: str, waits: bool) -> None:
    anatomy, room = anatomy_of("llama-3.1-70b"), Room("cuda", free * GIB, 64 * GIB)
    use, how, waiting = getting_by(anatomy, [large()], Use(), room)
    assert words in how
    assert (use.waiting is not None) == waits
    planned = [(large(), stored(anatomy, large(), "bfloat16"))]
    need, roomy = (walk_need("w", anatomy, planned, Use(), each) for each in (room, Room("cuda", 400 * GIB, 0)))
    assert need.nbytes is not None
    assert roomy.nbytes is not None
    assert need.least <= need.nbytes <= roomy.nbytes
    assert need.beside == (waiting if waits else 0)


def test_scoring_a_70b_goes_block_by_block_on_a_card(tmp_path: Path) -> None:
    anatomy, scored = anatomy_of("llama-3.1-70b"), Scored(16384, 512, "bfloat16", "cuda")
    small = scoring_need("s", anatomy, scored, Room("cuda", 80 * GIB, 64 * GIB))
    large_one = scoring_need("s", anatomy, scored, Room("cuda", 400 * GIB, 64 * GIB))
    assert small.how.startswith("a block at a time")
    assert large_one.how == "loaded whole"
    assert small.least < 12 * GIB < 130 * GIB < (large_one.nbytes or 0)


def test_inputs_of_all_blocks_wait_where_there_is_room() -> None:
    anatomy = anatomy_of("llama-3.1-70b")
    kept = Use().calibration_tokens * anatomy.hidden * anatomy.blocks * 2
    hows = {}
    for device, host in ((400, 0), (40, 400), (40, 40)):
        need = sensitivity_need("s", anatomy, Use(), Room("cuda", device * GIB, host * GIB))
        hows[need.how] = (need.beside, need.disk)
    assert hows == {
        "inputs of all blocks on the device": (0, 0),
        "inputs of all blocks in the CPU's memory": (kept, 0),
        "inputs of all blocks on disk": (0, kept),
    }
