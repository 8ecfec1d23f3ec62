"""What a budget is spent on: the units of a model, and the bytes that each choice takes of the real file."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from quantkit.allocation.budget import allocated, chosen_within, room_of
from quantkit.allocation.table import Unit
from quantkit.allocation.units import AnatomyModel, CheckpointModel, units_of
from quantkit.engine.skeleton import Skeleton
from quantkit.errors import SchemeError
from quantkit.estimation.inference import served
from quantkit.estimation.models import anatomy_of
from quantkit.estimation.use import Use
from quantkit.evaluation.memory import checkpoint_bytes
from quantkit.quantization.job import Job
from quantkit.quantization.stage import quantize
from quantkit.recipe.mixing import AutoSpec
from quantkit.system.validation import parse_section
from tests.architectures import make
from tests.tiny import make_model

INTS = {"choices": ["int3", "int4", "int8", "float"], "group_size": 32}
GGUF = {"format": "gguf", "choices": ["q4_0", "q5_0", "q8_0", "float"]}


def spec(budget: Any = 4.5, **keys: Any) -> AutoSpec:
    return parse_section(AutoSpec, {"name": "mix", "method": "rtn", "bits": "auto", "budget": budget, **keys}, "test")


def costed(units: list[Unit], seed: int = 0) -> list[Unit]:
    """With costs as layers have them."""
    random = np.random.default_rng(seed)
    return [
        replace(unit, costs={name: float(random.lognormal() / size**2) for name, size in unit.sizes.items()})
        for unit in units
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CheckpointModel]:
    folder = tmp_path_factory.mktemp("models")
    for name in ("untied", "tied"):
        make_model(folder / name, tie_word_embeddings=name == "tied")
    make(folder / "experts", "mixtral")
    jobs = {
        name: Job(folder / name, {"reference": "me/it"}, "float32", device="cpu")
        for name in ("untied", "tied", "experts")
    }
    return {name: CheckpointModel(job, Skeleton(job.source)) for name, job in jobs.items()}


def layers(units: list[Unit]) -> list[tuple[str, ...]]:
    return [tuple(name.removeprefix("model.layers.") for name in unit.layers) for unit in units]


def test_what_servers_load_as_one_matrix_or_stack_is_one_unit(models: dict[str, CheckpointModel]) -> None:
    found = layers(units_of(models["experts"], spec(**INTS)))
    assert found[:2] == [("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"), ("0.self_attn.o_proj",)]
    assert found[2] == tuple(f"0.block_sparse_moe.experts.{i}.{leaf}" for i in range(4) for leaf in ("w1", "w3", "w2"))
    stacks = layers(units_of(models["experts"], spec(**GGUF)))
    assert tuple(f"1.block_sparse_moe.experts.{i}.w2" for i in range(4)) in stacks
    assert ("1.self_attn.k_proj",) in stacks


def test_what_servers_join_in_deepseek_and_in_qwen_is_one_unit(tmp_path: Path) -> None:
    for name, joined in (
        ("deepseek_v3", ("0.self_attn.q_a_proj", "0.self_attn.kv_a_proj_with_mqa")),
        ("qwen3_5_moe_text", ("0.linear_attn.in_proj_qkv", "0.linear_attn.in_proj_z")),
    ):
        make(tmp_path / name, name)
        job = Job(tmp_path / name, {}, "float32", device="cpu")
        found = units_of(CheckpointModel(job, Skeleton(job.source)), spec(**INTS))
        assert set(joined) in map(set, layers(found))


def test_head_and_embedding_take_part_where_the_format_stores_them(models: dict[str, CheckpointModel]) -> None:
    apart, one = (layers(units_of(models[name], spec(**GGUF))) for name in ("untied", "tied"))
    assert (apart[0], apart[-1]) == (("model.embed_tokens",), ("lm_head",))
    assert (one[0], one[-1]) == (("model.embed_tokens",), ("1.mlp.down_proj",))
    assert ("lm_head",) not in layers(units_of(models["untied"], spec(**INTS)))
    assert ("lm_head",) in layers(units_of(models["untied"], spec(**INTS, ignore=[])))
    assert units_of(models["tied"], spec(**INTS, ignore=[]))[-1].sizes["float"] == 0


def test_layers_that_a_key_names_take_no_part(models: dict[str, CheckpointModel]) -> None:
    keys = {**INTS, "ignore": ["lm_head", "o_proj"], "overrides": {"down_proj": {"bits": 8}}}
    found = layers(units_of(models["untied"], spec(**keys)))
    assert [names[0] for names in found] == [
        f"{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.gate_proj")
    ]


def test_a_choice_is_there_for_layers_whose_shape_it_suits(tmp_path: Path) -> None:
    make_model(tmp_path / "model", hidden_size=64, intermediate_size=256)
    job = Job(tmp_path / "model", {}, "float32", device="cpu")
    model = CheckpointModel(job, Skeleton(job.source))
    units = units_of(model, spec(format="gguf", choices=["q2_k", "q6_k", "q8_0"]))
    choices = {unit.layers[0].rpartition(".")[2]: set(unit.sizes) for unit in units}
    assert choices["down_proj"] == {"q2_k", "q6_k", "q8_0"}
    assert choices["q_proj"] == choices["lm_head"] == {"q8_0"}
    for keys, tried in (({}, False), ({"choices": ["q4_k", "iq4_nl", "q8_0"]}, True)):  # K-quants suit the former
        (down,) = (
            each for each in units_of(model, spec(format="gguf", **keys)) if "layers.0.mlp.down" in each.layers[0]
        )
        assert {"q4_k", "q8_0"} < set(down.sizes)
        assert ("iq4_nl" in down.sizes) is tried
    with pytest.raises(SchemeError, match="256"):
        units_of(model, spec(format="gguf", choices=["q2_k", "q6_k"], ignore=["down_proj"]))


@pytest.mark.parametrize("keys", [INTS, GGUF, {"format": "bitsandbytes", "choices": ["nf4", "float"]}])
@pytest.mark.parametrize("name", ["untied", "tied", "experts"])
def test_without_weights_the_units_are_the_same(
    name: str, keys: dict[str, Any], models: dict[str, CheckpointModel]
) -> None:
    anatomy = AnatomyModel(anatomy_of(str(models[name].job.source)), "float32")
    assert units_of(anatomy, spec(**keys)) == units_of(models[name], spec(**keys))


FILES = [
    ("untied", INTS),
    ("tied", {"choices": ["int4", "int8", "float"], "format": "gptq", "group_size": 32}),
    ("untied", {"format": "bitsandbytes", "choices": ["nf4", "float"]}),
    ("tied", GGUF),
    ("experts", GGUF),
    ("experts", INTS),
]


def file_bytes(model: CheckpointModel, keys: dict[str, Any], units: list[Unit], chosen: tuple[str, ...]) -> int:
    return model.file_bytes(spec(**keys).with_choice(allocated(model, spec(**keys), units, chosen)))


def smallest(units: list[Unit]) -> tuple[str, ...]:
    return tuple(min(unit.sizes, key=unit.sizes.__getitem__) for unit in units)


@pytest.mark.parametrize(("name", "keys"), FILES)
def test_a_file_never_takes_more_than_its_budget(
    name: str, keys: dict[str, Any], models: dict[str, CheckpointModel], tmp_path: Path
) -> None:
    model, given = models[name], spec(**keys)
    units = costed(units_of(model, given))
    budget = round(1.4 * file_bytes(model, keys, units, smallest(units)))
    chosen = chosen_within(model, spec(f"{budget}B", **keys), units)
    assert chosen != smallest(units)
    made = quantize(model.job, given.with_choice(allocated(model, given, units, chosen)), tmp_path / "out")
    nbytes = checkpoint_bytes(made.folder)
    largest = max(abs(a - b) for unit in units for a, b in itertools.pairwise(sorted(unit.sizes.values())))
    assert budget - largest <= nbytes <= budget


@pytest.mark.parametrize("keys", [INTS, GGUF])
def test_more_room_is_used_and_never_costs_more(keys: dict[str, Any], models: dict[str, CheckpointModel]) -> None:
    model, costs = models["tied"], []
    units = costed(units_of(model, spec(**keys)), seed=1)
    least = file_bytes(model, keys, units, smallest(units))
    for budget in range(least, round(1.5 * least), least // 20):
        chosen = chosen_within(model, spec(f"{budget}B", **keys), units)
        assert file_bytes(model, keys, units, chosen) <= budget
        costs.append(allocated(model, spec(**keys), units, chosen).predicted)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0] / 2


def test_bits_are_those_of_the_units(models: dict[str, CheckpointModel]) -> None:
    model = models["untied"]
    units = costed(units_of(model, spec(**INTS)))
    weights = sum(unit.weights for unit in units)
    for bits in (4.7, 5.5, 8.0):
        found = allocated(model, spec(**INTS), units, chosen_within(model, spec(bits, **INTS), units))
        assert room_of(model, spec(bits, **INTS), units) == int(bits * weights / 8)
        assert bits - 0.7 < found.bits_per_weight <= bits


def test_memory_leaves_what_a_server_does_not_need_beside_the_file(models: dict[str, CheckpointModel]) -> None:
    model = models["untied"]
    units = units_of(model, spec(**INTS))
    beside = served(model.anatomy, 0, Use(context=256), llama_cpp=False).nbytes
    size = file_bytes(model, INTS, units, smallest(units)) + 7000
    memory = {"memory": size + beside, "context": 256}
    assert room_of(model, spec(memory, **INTS), units) == room_of(model, spec(f"{size}B", **INTS), units)


@pytest.mark.parametrize("budget", [2.0, "1kB", {"memory": "700kB", "context": 128}])
def test_a_budget_that_nothing_meets_is_told_with_the_least_that_can_be(
    budget: Any, models: dict[str, CheckpointModel]
) -> None:
    model = models["untied"]
    units = costed(units_of(model, spec(**INTS)))
    with pytest.raises(SchemeError, match="cannot be met, as the smallest choices take") as refused:
        room_of(model, spec(budget, **INTS), units)
    told = yaml.safe_load(refused.value.remedy.removeprefix("write ").partition(", or add")[0])["budget"]
    assert chosen_within(model, spec(told, **INTS), units) == smallest(units)
    assert "\n" not in str(refused.value)
