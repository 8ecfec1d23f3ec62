"""Experts are calibrated on the tokens that reach them, beside those of their whole layer, and solved together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.engine import statistics as statistics_module
from quantkit.engine import steps as steps_module
from quantkit.engine.batches import Batch, make_batches, row_starts
from quantkit.engine.fisher import Fisher, LayerFisher
from quantkit.engine.routing import ExpertSettings, alike, common_name, completed, routed_kinds, steps
from quantkit.engine.sensitivity import Sensitivity
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.statistics import Gatherer, Pool
from quantkit.engine.tasks import VariantTask
from quantkit.engine.walk import Walk, WalkSettings
from quantkit.errors import QuantizationError
from quantkit.methods.base import InputStatistics, Method, MethodOptions, Solution, Statistic
from quantkit.quantization import Job
from quantkit.quantization.expert_tokens import expert_notes, expert_tokens
from quantkit.quantization.job import made_from
from quantkit.recipe import VariantSpec
from quantkit.schemes import IntScheme, Scheme
from quantkit.system.progress import Silent
from tests.architectures import make
from tests.test_walk import RoutedModel, routed_rows, write_routed
from tests.tiny import Collected, tiny_method, tiny_rows, tiny_steps

CPU = torch.device("cpu")
EQUAL = tiny_rows(count=6, shortest=48, longest=48)
UNEQUAL = tiny_rows(count=6, shortest=5, longest=48)
MEANS = (Statistic.ABS_MEAN, Statistic.SQUARE_MEAN, Statistic.GRAM)
"""Statistics that are blended with those of all experts."""


class Onlooker(Method):
    """Rounds to nearest, and keeps the statistics that it is given, by the values of the weight."""

    needs = frozenset(Statistic)

    def __init__(self) -> None:
        super().__init__(MethodOptions())
        self.seen: dict[bytes, InputStatistics] = {}

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        self.seen[weight[0].numpy().tobytes()] = deepcopy(replace(statistics, derived={}))
        return tiny_method("rtn").quantize(weight, statistics, scheme, scale_dtype)

    def of(self, folder: Path, layer: str) -> InputStatistics:
        """What it was given for a layer that the checkpoint names."""
        return self.seen[CheckpointReader(folder).read(f"{layer}.weight")[0].numpy().tobytes()]


def solved(
    folder: Path, rows: Sequence[Sequence[int]] | Sequence[Batch], method: Any, may_pad: bool = False, **settings: Any
) -> Collected:
    """All layers of a mixture but the routers, solved on the CPU."""
    skeleton, sink = Skeleton(folder), Collected()
    names = [name for segment in skeleton.segments for name in segment.linears if not name.endswith(("gate", "router"))]
    chosen = getattr(method, "method", method)
    task = VariantTask(
        "variant", chosen, dict.fromkeys(names, IntScheme(4, 32, True)), torch.float16, sink,
        transforms=getattr(method, "transforms", ()),
    )  # fmt: skip
    given = [each for each in rows if isinstance(each, Batch)]
    batches = given or make_batches([list(row) for row in rows if not isinstance(row, Batch)], CPU, may_pad, 128)
    Walk(skeleton, CheckpointReader(folder), batches, [task], WalkSettings(CPU, **settings)).run()
    return sink


def same_codes(found: Collected, wanted: Collected) -> None:
    assert set(found.results) == set(wanted.results)
    for name, result in wanted.results.items():
        assert torch.equal(found.results[name].weight.codes, result.weight.codes), name
        assert torch.equal(found.results[name].weight.scales, result.weight.scales), name
        assert found.results[name].tokens == result.tokens


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    make(folder, "mixtral")
    return folder


def expert(number: int, leaf: str, block: int = 0) -> str:
    return f"model.layers.{block}.block_sparse_moe.experts.{number}.{leaf}"


# What an expert is calibrated on


def gathered(inputs: torch.Tensor) -> Gatherer:
    found = Gatherer(frozenset(Statistic))
    found.add(inputs, Batch(torch.zeros(1, len(inputs), dtype=torch.int64), None))
    return found


@pytest.mark.parametrize("prior", [0.5, 2.0])
def test_statistics_are_blended_by_the_tokens_that_an_expert_saw(prior: float) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(tokens, 8, generator=draw) + tokens for tokens in (30, 5)]
    parts, pool = [gathered(each) for each in inputs], Pool()
    parts.append(Gatherer(frozenset(Statistic)))
    for part in parts:
        pool.add(part)
    found = [pool.blended(part, prior) for part in parts]
    means = {
        Statistic.GRAM: lambda rows: rows.T @ rows / len(rows),
        Statistic.ABS_MEAN: lambda rows: rows.abs().mean(0),
        Statistic.SQUARE_MEAN: lambda rows: rows.square().mean(0),
    }
    mean: Callable[[torch.Tensor], torch.Tensor]
    for statistic, mean in means.items():
        whole = mean(torch.cat(inputs))
        for own, statistics in zip(inputs, found, strict=False):
            wanted = (len(own) * mean(own) + prior * 8 * whole) / (len(own) + prior * 8)
            torch.testing.assert_close(getattr(statistics, statistic.value), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(getattr(found[2], statistic.value), whole, rtol=1e-4, atol=1e-4)
    assert [each.tokens for each in found] == [30, 5, 0]


def test_without_a_prior_each_expert_has_its_own_alone() -> None:
    inputs = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    pool = Pool()
    assert pool.blended(Gatherer(frozenset(Statistic)), 0.0) == InputStatistics()
    found = pool.blended(gathered(inputs), 0.0).gram
    assert found is not None
    torch.testing.assert_close(found, inputs.T @ inputs / 30)


def test_an_expert_that_saw_nothing_is_solved_with_the_statistics_of_its_layer(mixtral: Path) -> None:
    rows, onlooker = [EQUAL[0][:1]], Onlooker()
    found = solved(mixtral, rows, onlooker, inputs="float")
    unseen = [name for name, each in found.results.items() if each.experts and each.tokens == 0]
    assert unseen
    for name in unseen:
        assert found.results[name].experts == name.rpartition(".experts.")[0] + ".experts"
        assert not any("no calibration token" in note for note in found.results[name].notes)
    block = next(0 if "layers.0." in name else 1 for name in unseen)
    number = next(int(name.split(".experts.")[1][0]) for name in unseen if f"layers.{block}." in name)
    gate = onlooker.of(mixtral, expert(number, "w1", block))
    router = onlooker.of(mixtral, f"model.layers.{block}.self_attn.q_proj")
    assert gate.tokens == 0
    assert router.tokens == 1
    assert gate.gram is not None
    alone = solved(mixtral, rows, tiny_method(), inputs="float", experts=ExpertSettings(prior=0))
    assert any("no calibration token" in note for note in alone.results[unseen[0]].notes)


@pytest.fixture
def whole_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of inputs have all tokens, however these are batched."""
    monkeypatch.setattr(statistics_module, "SAMPLED_EACH", 4096)
    monkeypatch.setattr(statistics_module, "SAMPLED", 4096)


def are_among(rows: torch.Tensor | None, others: torch.Tensor | None) -> bool:
    """Whether each row is one of the others, in any order and but for rounding."""
    assert rows is not None
    assert others is not None
    return all(torch.isclose(row, others, rtol=1e-3, atol=1e-4).all(1).any() for row in rows)


@pytest.mark.usefixtures("whole_samples")
def test_what_all_experts_read_together_is_what_their_layer_reads(mixtral: Path) -> None:
    """Each token goes to two, so that it counts twice: the mean is that over all tokens.

    The largest magnitudes and the sample are an expert's own: together they are those of all tokens.
    """
    shown, onlooker = Onlooker(), Onlooker()
    solved(mixtral, EQUAL, onlooker, inputs="float", experts=ExpertSettings(prior=1e6))
    solved(mixtral, EQUAL, shown, inputs="float", experts=ExpertSettings("all", prior=0))
    for number in range(4):
        found, wanted = (each.of(mixtral, expert(number, "w1")) for each in (onlooker, shown))
        for statistic in MEANS:
            torch.testing.assert_close(
                getattr(found, statistic.value), getattr(wanted, statistic.value), rtol=1e-3, atol=1e-4
            )
        assert found.tokens == wanted.tokens < sum(map(len, EQUAL)), "tokens are those that were routed"
        assert found.sample is not None
        assert len(found.sample) == found.tokens
        assert are_among(found.sample, wanted.sample)
    own = [onlooker.of(mixtral, expert(number, "w1")) for number in range(4)]
    of_all = shown.of(mixtral, expert(0, "w1"))
    largest, samples = ([getattr(each, name) for each in own] for name in ("abs_max", "sample"))
    torch.testing.assert_close(torch.stack(largest).amax(0), of_all.abs_max, rtol=1e-3, atol=1e-4)
    assert are_among(of_all.sample, torch.cat(samples))


@pytest.mark.usefixtures("whole_samples")
@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_padding_does_not_reach_experts(tmp_path: Path, architecture: str, inputs: str) -> None:
    make(tmp_path, architecture)
    together, apart = Onlooker(), Onlooker()
    padded = solved(tmp_path, UNEQUAL, together, may_pad=True, inputs=inputs)
    batches = [make_batches([row], CPU, may_pad=False)[0] for row in UNEQUAL]
    alone = solved(tmp_path, batches, apart, inputs=inputs)
    assert {name: each.tokens for name, each in padded.results.items()} == {
        name: each.tokens for name, each in alone.results.items()
    }
    assert together.seen.keys() == apart.seen.keys()
    for weight, found in together.seen.items():
        other = apart.seen[weight]
        for statistic in (*MEANS, Statistic.ABS_MAX):
            own, wanted = (getattr(each, statistic.value) for each in (found, other))
            torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-4)
        if found.sample is None or other.sample is None:
            assert found.sample is other.sample
            continue
        assert len(found.sample) == len(other.sample)
        assert are_among(found.sample, other.sample)
        assert are_among(other.sample, found.sample)


def test_weights_of_tokens_reach_experts(mixtral: Path) -> None:
    """A token that counts nothing might as well not be there."""
    (batch,) = make_batches(EQUAL[:2], CPU, may_pad=False)
    weights = torch.ones(96)
    weights[48:] = 0
    names = [name for segment in Skeleton(mixtral).segments for name in segment.linears]
    fisher = Fisher(dict.fromkeys(names, LayerFisher(torch.ones(1), 96, weights)), 0.0, 96)
    known = Sensitivity(fisher, *row_starts([batch]), 1.0)
    onlooker, first = Onlooker(), Onlooker()
    solved(mixtral, [batch], onlooker, inputs="float", experts=ExpertSettings(prior=0), sensitivity=known)
    solved(mixtral, EQUAL[:1], first, inputs="float", experts=ExpertSettings(prior=0))
    for number in range(4):
        wanted = first.of(mixtral, expert(number, "w2"))
        if wanted.tokens:
            found = onlooker.of(mixtral, expert(number, "w2"))
            torch.testing.assert_close(found.gram, wanted.gram, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_showing_experts_all_tokens_changes_no_output(mixtral: Path, inputs: str) -> None:
    shown, onlooker = Onlooker(), Onlooker()
    rows = EQUAL[:2]
    found = solved(mixtral, rows, shown, inputs=inputs, experts=ExpertSettings("all"))
    solved(mixtral, rows, onlooker, inputs=inputs)
    assert all(each.tokens <= 96 for each in found.results.values())
    name = "model.layers.1.self_attn.q_proj"
    assert torch.equal(shown.of(mixtral, name).gram, onlooker.of(mixtral, name).gram)  # type: ignore[arg-type]
    down = shown.of(mixtral, expert(2, "w2"))
    assert not torch.allclose(down.gram, onlooker.of(mixtral, expert(2, "w2")).gram)  # type: ignore[arg-type]


# How they are solved


@pytest.mark.parametrize("method", ["gptq", "awq+gptq", "rtn"])
@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_experts_in_parts_and_one_by_one_get_the_codes_of_all_together(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch, method: str, inputs: str
) -> None:
    steps = tiny_steps(method)
    whole = solved(mixtral, EQUAL, steps, inputs=inputs)
    same_codes(solved(mixtral, EQUAL, steps, inputs=inputs, strategy="recompute"), whole)
    monkeypatch.setitem(steps_module.BATCH_WEIGHTS, "cpu", 2 * 2 * 64 * 128)
    same_codes(solved(mixtral, EQUAL, steps, inputs=inputs, room=1), whole)
    monkeypatch.setitem(steps_module.BATCH_WEIGHTS, "cpu", 1)
    same_codes(solved(mixtral, EQUAL, steps, inputs=inputs, room=3 * 4 * 64**2), whole)


def test_the_statistics_of_few_experts_are_alive_at_a_time(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steps_module.BATCH_WEIGHTS, "cpu", 1)
    most = 0
    original = Gatherer.add

    def counted(self: Gatherer, inputs: torch.Tensor, batch: Batch) -> None:
        nonlocal most
        original(self, inputs, batch)
        alive.add(self)
        most = max(most, sum(bool(each.sums) for each in alive))

    alive: set[Gatherer] = set()
    monkeypatch.setattr(Gatherer, "add", counted)
    solved(mixtral, EQUAL, tiny_method(), inputs="quantized", room=2 * 4 * 128**2)
    assert most <= 8, "eight of the narrower inputs have the room of two of the wider"
    most = 0
    alive.clear()
    solved(mixtral, EQUAL, tiny_method(), inputs="float", room=4 * 64**2)
    assert most <= 3, "those of attention and of one expert"


# How they are found


def layer_names(folder: Path) -> tuple[dict[str, Any], list[str]]:
    skeleton = Skeleton(folder)
    layers = {layer.name: layer for layer in skeleton.segments[0].layers}
    return layers, list(layers)


def test_experts_are_layers_that_differ_in_a_number_and_see_some_tokens(mixtral: Path) -> None:
    layers, names = layer_names(mixtral)
    numbered = alike(layers.values())
    assert set(numbered) == {name for name in names if ".experts." in name}
    gates = [expert(number, "w1") for number in range(4)]
    ups = [expert(number, "w3") for number in range(4)]
    downs = [expert(number, "w2") for number in range(4)]
    shown = [[gates[1], ups[1]], [downs[1]], [gates[3], ups[3]], [downs[3]]]
    positions = dict.fromkeys(names, 10)
    routed = routed_kinds(numbered, shown, positions, 10)
    assert len(routed) == 3, "some are not called, so that tokens are shared out"
    whole = completed(shown, numbered, routed)
    assert whole[:4] == [[gates[1], ups[1]], [gates[0], ups[0]], [gates[2], ups[2]], [downs[1]]]
    assert [len(step) for step in steps([["first"], *whole], numbered, routed)] == [1, 4, 4]
    every = [[gate, up] for gate, up in zip(gates, ups, strict=True)] + [[down] for down in downs]
    assert routed_kinds(numbered, every, positions, 10) == set(), "all are given all"
    assert len(routed_kinds(numbered, every, {**positions, gates[2]: 9}, 10)) == 1
    assert routed_kinds(numbered, [gates, ups], positions, 20) == set(), "layers of one input are no experts"
    assert common_name([gates[1], gates[2]]) == "model.layers.0.block_sparse_moe.experts"


def test_a_report_counts_the_tokens_of_each_expert() -> None:
    shapes = {f"mlp.experts.{number}.{leaf}": (8, 16) for number in range(12) for leaf in ("gate", "down")}
    found = {"mlp.experts": {name: int(name.split(".")[2]) * 10 for name in shapes}}
    (table,) = expert_tokens(found, shapes)
    assert (list(table.tokens), table.wanted, table.few) == ([10 * number for number in range(12)], 64, 7)
    (note,) = expert_notes([table], ExpertSettings())
    assert note.startswith("7 of 12 experts saw fewer than 64 calibration tokens, 4 times the width")
    assert "1 of them none" in note
    assert expert_notes([table], ExpertSettings("all")) == []


class Notes(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def test_quantizing_a_mixture_tells_the_tokens_of_its_experts(mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "records.json").write_text(json.dumps([{"text": f"a record, {index}"} for index in range(6)]))
    calibration = {"dataset": str(tmp_path / "records.json"), "max_length": 32, "samples": 6}
    facts, told = {}, {}
    for experts in ("routed", "all"):
        watching = Notes()
        out = quantkit.quantize(
            mixtral, out=tmp_path / experts, calibration=calibration | {"experts": experts}, bits=4, group_size=32,
            device="cpu", observer=watching,
        )  # fmt: skip
        facts[experts], told[experts] = json.loads((out / "stage.json").read_text())["facts"], watching.told
    for table in facts["routed"]["experts"]:
        assert len(table["tokens"]) == 4
        assert sum(table["tokens"]) == 2 * facts["routed"]["layers"][0]["tokens"]
        assert table["wanted"] == 4 * 64
        lines = [line for line in told["routed"] if line.startswith(f"{table['name']}: 4 experts, calibration tokens")]
        assert len(lines) == 1
    assert [table["name"] for table in facts["routed"]["experts"]] == [
        f"model.layers.{block}.block_sparse_moe.experts" for block in range(2)
    ]
    assert any("experts saw fewer than 256 calibration tokens" in note for note in facts["routed"]["notes"])
    assert not any("experts saw fewer" in note for note in facts["all"]["notes"])
    errors = [[layer["error_after"] for layer in each["layers"]] for each in facts.values()]
    assert errors[0] != errors[1]


def test_how_experts_are_calibrated_is_part_of_what_a_variant_is_made_from(mixtral: Path) -> None:
    job = Job(mixtral, {}, "float32", EQUAL, "x")
    spec = VariantSpec(name="v")
    assert made_from(job, spec) != made_from(replace(job, experts=ExpertSettings("all")), spec)
    assert made_from(job, spec) != made_from(replace(job, experts=ExpertSettings(prior=0)), spec)
    free = VariantSpec(name="v", method="rtn")
    assert made_from(job, free) == made_from(replace(job, experts=ExpertSettings("all")), free)


def test_experts_of_a_models_own_code_cannot_be_shown_all_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_routed(tmp_path, RoutedModel(), monkeypatch)
    rows = routed_rows([(30, [0, 1, 2, 3])] * 6)
    with pytest.raises(QuantizationError, match=r"computed by the model's own code.*experts: routed"):
        solved(tmp_path, rows, tiny_method(), experts=ExpertSettings("all"))
    for inputs in ("quantized", "float"):
        whole = solved(tmp_path, rows, tiny_method(), inputs=inputs)
        same_codes(solved(tmp_path, rows, tiny_method(), inputs=inputs, room=1), whole)
        assert {result.experts for result in whole.results.values() if ".experts." in result.name} == {
            "layers.0.experts", "layers.1.experts"
        }  # fmt: skip
