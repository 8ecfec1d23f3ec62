"""The walk gives what a plain implementation of true-sequential calibration gives, and cleans up behind itself."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM

from quantkit.checkpoint import CheckpointReader
from quantkit.engine import batches as batches_module
from quantkit.engine import outline
from quantkit.engine.batches import Batch, make_batches
from quantkit.engine.groups import call_order, shared_inputs
from quantkit.engine.layers import Layer
from quantkit.engine.passes import Pass
from quantkit.engine.routing import ExpertSettings
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.tasks import LayerResult, VariantTask
from quantkit.engine.walk import Strategy, Walk, WalkSettings
from quantkit.errors import CheckpointError, QuantizationError
from quantkit.methods.base import InputStatistics, Method, MethodOptions, Solution, Statistic
from quantkit.schemes import IntScheme, Scheme
from tests.tiny import FAMILIES, Collected, make_model, tiny_method, tiny_rows, tiny_steps, tiny_task, walk

CPU = torch.device("cpu")
SCHEME = IntScheme(4, 32, True)
LLAMA_GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
NEOX_GROUPS = [["attention.query_key_value"], ["attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]]


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batches_module.BATCH_TOKENS, "cpu", 128)


def family_model(folder: Path, family: str, **changes: Any) -> Path:
    own: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 8}, "gpt_neox": {"tie_word_embeddings": True}}
    return make_model(folder, family, **(own.get(family, {}) | changes))


def family_groups(family: str, blocks: int = 2) -> list[list[str]]:
    prefix, groups = ("gpt_neox", NEOX_GROUPS) if family == "gpt_neox" else ("model", LLAMA_GROUPS)
    return [[f"{prefix}.layers.{block}.{name}" for name in group] for block in range(blocks) for group in groups]


def layer_inputs(model: nn.Module, layer: nn.Module, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """What a layer is given when the whole model runs, row by row: float64 ``[tokens, in_features]``."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].reshape(-1, args[0].shape[-1]).double())

    hook = layer.register_forward_pre_hook(keep)
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]), use_cache=False)
    hook.remove()
    return torch.cat(seen) if seen else torch.empty(0, 0)


def true_sequential(
    model: nn.Module, groups: list[list[str]], rows: Sequence[Sequence[int]], method: Method, found: Collected
) -> dict[str, Solution]:
    """The plain way: for each group in turn the whole model runs anew, with all that was solved before in place.

    What is put in place is what the walk found, so that a code that rounding flips is not passed on.
    """
    solved = {}
    for names in groups:
        inputs = layer_inputs(model, model.get_submodule(names[0]), rows)
        gram = (inputs.T @ inputs / len(inputs)).float() if len(inputs) else None
        statistics = InputStatistics(tokens=len(inputs), gram=gram)
        for name in names:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter)
            solved[name] = method.quantize(weight.detach().clone(), statistics, SCHEME, torch.float16)
        for name in names:
            model.get_submodule(name).weight.data = found.results[name].weight.dequantize(torch.float32)
    return solved


def assert_same_solution(found: Collected, expected: dict[str, Solution]) -> None:
    """Alike but for what the order of float sums may flip: no more than 1 % of a layer's codes, errors within 1 %."""
    assert list(found.results) == list(expected)
    for name, solution in expected.items():
        result = found.results[name]
        assert (result.weight.codes != solution.weight.codes).float().mean() <= 0.01, name
        assert torch.allclose(result.error, solution.error.sum() / solution.energy.sum(), rtol=0.01), name


def assert_same_bytes(found: Collected, expected: Collected) -> None:
    assert list(found.results) == list(expected.results)
    for name, result in found.results.items():
        other = expected.results[name]
        for part in ("codes", "scales", "zeros"):
            assert torch.equal(getattr(result.weight, part), getattr(other.weight, part)), (name, part)
        assert (result.error, result.error_before, result.tokens, result.notes) == (
            other.error,
            other.error_before,
            other.tokens,
            other.notes,
        )


HEADS = {"gpt_neox": "embed_out"}
"""Output heads that checkpoints call otherwise than transformers does in memory."""


class Spy(Method):
    """Records what it is given and solves with another method."""

    needs = frozenset(Statistic)

    def __init__(self, inner: Method) -> None:
        super().__init__(MethodOptions())
        self.inner = inner
        self.seen: list[tuple[int, InputStatistics]] = []

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        self.seen.append((len(weight), statistics))
        return self.inner.quantize(weight, statistics, scheme, scale_dtype)


class RecordingReader(CheckpointReader):
    """Remembers which tensors were asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: set[str] = set()

    def read(self, name: str) -> torch.Tensor:
        self.asked.add(name)
        return super().read(name)


# The walk against the plain way


@pytest.mark.parametrize("strategy", ["one-pass", "recompute"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_inputs_is_true_sequential_calibration(tmp_path: Path, family: str, strategy: Strategy) -> None:
    folder, rows, method = family_model(tmp_path, family), tiny_rows(), tiny_method(correction=False, damping=0.03)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    found = walk(folder, rows, method, strategy=strategy)

    expected = true_sequential(model, family_groups(family), rows, method, found)
    assert_same_solution(found, expected)
    # The test would see it if the inputs were the float model's.
    float_fed = walk(folder, rows, method, inputs="float")
    last = next(reversed(expected))
    assert (float_fed.results[last].weight.codes != expected[last].weight.codes).float().mean() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_strategies_and_runs_give_the_same_bytes(tmp_path: Path, family: str) -> None:
    folder, rows, method = family_model(tmp_path, family), tiny_rows(), tiny_method()
    first = walk(folder, rows, method, head=True)
    assert HEADS.get(family, "lm_head") in first.results
    assert_same_bytes(walk(folder, rows, method, head=True), first)
    assert_same_bytes(walk(folder, rows, method, head=True, strategy="recompute"), first)


@pytest.mark.parametrize("inputs", ["quantized", "float"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_with_one_input_are_solved_as_one(tmp_path: Path, family: str, inputs: str) -> None:
    spy, rows = Spy(tiny_method("rtn")), tiny_rows()
    walk(family_model(tmp_path, family), rows, spy, inputs=inputs)
    block = [192, 64, 128, 64] if family == "gpt_neox" else [64 + 2 * 32, 64, 2 * 128, 64]
    assert [stacked for stacked, _ in spy.seen] == block * 2
    assert {statistics.tokens for _, statistics in spy.seen} == {sum(map(len, rows))}


def test_passes_in_bfloat16_solve_from_the_float32_weights(tmp_path: Path) -> None:
    folder, rows = make_model(tmp_path), tiny_rows()
    exact = walk(folder, rows, tiny_method())
    coarse = walk(folder, rows, tiny_method(), dtype=torch.bfloat16)
    rounded_weights = walk(folder, rows, tiny_method("rtn"), dtype=torch.bfloat16)
    assert_same_bytes(rounded_weights, walk(folder, rows, tiny_method("rtn")))
    for name, result in coarse.results.items():
        assert result.error == pytest.approx(exact.results[name].error.item(), rel=0.1)


def test_the_shortest_row_can_be_a_batch_by_itself(tmp_path: Path) -> None:
    """Segments are tried with it, and what is gathered is the same but for rounding."""
    rows = [row[: 1 + index] for index, row in enumerate(tiny_rows())]
    one, other = make_batches(rows, CPU, may_pad=True), make_batches(rows, CPU, may_pad=True, ends_short=True)
    assert [batch.rows for batch in other] == [one[0].rows[:-1], (0,)]
    assert make_batches(rows[:1], CPU, may_pad=True, ends_short=True)[0].rows == (0,)
    skeleton = Skeleton(make_model(tmp_path))
    found = []
    for batches in (one, other):
        task, sink = tiny_task(skeleton, tiny_method())
        Walk(skeleton, CheckpointReader(tmp_path), batches, [task], WalkSettings(CPU, inputs="float")).run()
        found.append({name: float(result.error) for name, result in sink.results.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-2)


def test_progress_is_told_segment_by_segment(tmp_path: Path) -> None:
    skeleton, told = Skeleton(make_model(tmp_path)), list[tuple[int, int]]()
    task, sink = tiny_task(skeleton, tiny_method(), head=True)
    batches = make_batches(tiny_rows(), CPU, may_pad=True)
    reader = CheckpointReader(tmp_path)
    Walk(skeleton, reader, batches, [task], WalkSettings(CPU), lambda *counts: told.append(counts)).run()
    assert sink.segments == ["model.layers.0", "model.layers.1", "lm_head"]
    assert told == [(1, 3), (2, 3), (3, 3)]


# The head


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("gemma", True), ("gpt_neox", True)])
@pytest.mark.parametrize("strategy", ["one-pass", "recompute"])
def test_head_is_solved_on_what_reaches_it(tmp_path: Path, family: str, tied: bool, strategy: Strategy) -> None:
    folder, rows, method = (
        family_model(tmp_path, family, tie_word_embeddings=tied),
        tiny_rows(),
        tiny_method(correction=False),
    )
    assert ("lm_head.weight" in CheckpointReader(folder)) is not tied
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    found = walk(folder, rows, method, head=True, strategy=strategy)
    found.results["lm_head"] = found.results.pop(HEADS.get(family, "lm_head"))

    expected = true_sequential(model, [*family_groups(family), ["lm_head"]], rows, method, found)
    assert_same_solution(found, expected)
    assert found.results["lm_head"].tokens == sum(map(len, rows))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_head_whose_weight_is_missing_is_not_taken_for_a_tied_one(tmp_path: Path, method: str) -> None:
    def without_head(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]

    rewrite(make_model(tmp_path), without_head)
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is not in the checkpoint"):
        walk(tmp_path, tiny_rows(), tiny_method(method), head=True)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_head_that_nobody_wants_is_never_read(tmp_path: Path, method: str) -> None:
    skeleton, reader = Skeleton(make_model(tmp_path)), RecordingReader(tmp_path)
    task, sink = tiny_task(skeleton, tiny_method(method))
    Walk(skeleton, reader, make_batches(tiny_rows(), CPU, may_pad=True), [task], WalkSettings(CPU)).run()
    assert "lm_head.weight" not in reader.asked
    assert "lm_head" not in sink.results
    assert skeleton.head is not None
    assert skeleton.head.module.get_parameter("weight").is_meta
    assert ("model.embed_tokens.weight" in reader.asked) == (method == "gptq")


# The float inputs


def float_variants(skeleton: Skeleton) -> list[tuple[VariantTask, Collected]]:
    """Variants that ask for different statistics of the same inputs, some of them with parts of a group ignored."""

    def variant(name: str, method: str, scheme: Scheme | None = None, ignored: str = "", **options: Any) -> Any:
        task, sink = tiny_task(skeleton, tiny_steps(method, **options), scheme, name=name)
        kept = {layer: each for layer, each in task.schemes.items() if not ignored or ignored not in layer}
        return replace(task, schemes=kept), sink

    first, other = ("query_key_value", "dense") if "gpt_neox" in skeleton.segments[0].prefix else ("q_proj", "k_proj")
    ordered = IntScheme(4, 32, True, desc_act=True)
    return [
        variant("four", "gptq", IntScheme(4, 32, True)),
        variant("three", "gptq", IntScheme(3, -1, False), search=1),
        tiny_task(skeleton, tiny_method("rtn"), IntScheme(8, -1, True), head=True, name="eight"),
        variant("plain", "rtn"),
        variant("weighted", "rtn", range="weighted"),
        variant("awq", "awq"),
        variant("awq without the first", "awq", ignored=first),
        variant("awq without another", "awq", ignored=other),
        variant("awq+gptq", "awq+gptq", ignored=first, damping=0.1),
        variant("ordered", "gptq", ordered),
        variant("ordered by awq", "awq", ordered, clip=False),
        variant("ordered and weighted", "rtn", ordered, range="weighted"),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_variants_of_a_float_inputs_are_what_each_is_alone(tmp_path: Path, family: str) -> None:
    folder = family_model(tmp_path, family)
    with_outliers(folder)
    reader, settings = CheckpointReader(folder), WalkSettings(CPU, inputs="float")
    batches = make_batches(tiny_rows(), CPU, may_pad=True)
    skeleton = Skeleton(folder)
    together = float_variants(skeleton)
    Walk(skeleton, reader, batches, [task for task, _ in together], settings).run()
    for index, (of, sink) in enumerate(together):
        alone = Skeleton(folder)
        task, expected = float_variants(alone)[index]
        Walk(alone, reader, batches, [task], settings).run()
        assert set(sink.results) == set(of.schemes)
        assert sink.replaced.keys() == expected.replaced.keys(), of.name
        assert bool(sink.replaced) == ("awq" in of.method.name or bool(of.transforms)), of.name
        for name, tensor in sink.replaced.items():
            assert torch.equal(tensor, expected.replaced[name]), (of.name, name)
        for name, result in sink.results.items():
            other = expected.results[name]
            assert torch.equal(result.weight.codes, other.weight.codes), (of.name, name)
            assert torch.equal(result.weight.scales, other.weight.scales), (of.name, name)
            assert torch.equal(result.error, other.error), (of.name, name)
            assert result.tokens == other.tokens, (of.name, name)


def with_outliers(folder: Path) -> None:
    """Make some channels of the norms far stronger, and q and k weigh their columns differently, so that factors do."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor[::7] += 8.0
            if name.endswith("q_proj.weight"):
                tensor[:, :20] *= 6
            if name.endswith("k_proj.weight"):
                tensor[:, 30:] *= 6

    rewrite(folder, change)


@pytest.mark.parametrize("family", FAMILIES)
def test_float_inputs_sees_the_float_model(tmp_path: Path, family: str) -> None:
    folder, rows = family_model(tmp_path, family), tiny_rows()
    spy = Spy(tiny_method("rtn"))
    walk(folder, rows, spy, inputs="float")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for names, (_, statistics) in zip(family_groups(family), spy.seen, strict=True):
        inputs = layer_inputs(model, model.get_submodule(names[0]), rows)
        assert statistics.gram is not None
        assert statistics.abs_mean is not None
        assert statistics.square_mean is not None
        torch.testing.assert_close(statistics.gram.double(), inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.abs_mean.double(), inputs.abs().mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.square_mean.double(), inputs.square().mean(0), rtol=1e-4, atol=1e-5)


def test_quantized_inputs_takes_one_variant(tmp_path: Path) -> None:
    skeleton = Skeleton(make_model(tmp_path))
    tasks = [task for task, _ in float_variants(skeleton)]
    with pytest.raises(ValueError, match="one task per walk"):
        Walk(skeleton, CheckpointReader(tmp_path), [], tasks, WalkSettings(CPU)).run()


# No statistics, no pass


@pytest.fixture
def no_forward() -> Iterator[None]:
    def refuse(module: nn.Module, _: Any) -> None:
        raise AssertionError(f"{type(module).__name__} was called")

    handle = register_module_forward_pre_hook(refuse)
    yield
    handle.remove()


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_a_method_that_needs_nothing_runs_nothing(tmp_path: Path, inputs: str) -> None:
    folder = make_model(tmp_path)
    found = walk(folder, tiny_rows(), tiny_method("rtn"), head=True, inputs=inputs)
    assert len(found.results) == 15
    assert all(result.tokens == 0 and result.notes == () for result in found.results.values())
    with pytest.raises(QuantizationError, match="was called"):
        walk(folder, tiny_rows(), tiny_method("gptq"), inputs=inputs)


def test_rtn_result_is_the_method_applied_to_each_weight(tmp_path: Path) -> None:
    folder, method = make_model(tmp_path), tiny_method("rtn")
    reader = CheckpointReader(folder)
    for name, result in walk(folder, [], method, head=True).results.items():
        alone = method.quantize(reader.read(f"{name}.weight"), InputStatistics(), SCHEME, torch.float16)
        assert torch.equal(result.weight.codes, alone.weight.codes)
        assert result.error == pytest.approx((alone.error.sum() / alone.energy.sum()).item())


# Experts


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.gate(hidden).tanh() * self.up(hidden))
        return out


class RoutedBlock(nn.Module):
    """Four experts, each for the tokens of one range of ids, between two layers that see all tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.after = nn.Linear(width, width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(4))

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        flat = (hidden + self.mix(hidden)).reshape(-1, hidden.shape[-1])
        for index, expert in enumerate(self.experts):
            rows = (chosen.reshape(-1) == index).nonzero().squeeze(1)
            if len(rows):
                flat = flat.index_add(0, rows, expert(flat[rows]))
        out: torch.Tensor = hidden + self.after(flat).view_as(hidden)
        return out


class RepeatingBlock(RoutedBlock):
    """Calls one of its layers twice."""

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return super().forward(self.mix(hidden), chosen)


class RoutedModel(nn.Module):
    def __init__(self, block: type[RoutedBlock] = RoutedBlock, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.layers = nn.ModuleList(block(width) for _ in range(2))
        self.head = nn.Linear(width, 40, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, chosen=input_ids // 10)
        out: torch.Tensor = self.head(hidden)
        return out


def routed_rows(lengths_and_experts: list[tuple[int, list[int]]]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    rows = []
    for length, experts in lengths_and_experts:
        expert = torch.tensor(experts)[torch.randint(len(experts), (length,), generator=draw)]
        rows.append((expert * 10 + torch.randint(10, (length,), generator=draw)).tolist())
    return rows


ROUTED_ROWS = routed_rows([(60, [0, 2]), (59, [0, 1]), (58, [0, 1, 2]), (57, [2]), (57, [1])])


@pytest.fixture
def routed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, RoutedModel]:
    """A folder with a routed model's weights, and that model; ``Skeleton`` builds it empty."""
    torch.manual_seed(0)
    model = RoutedModel()
    write_routed(tmp_path, model, monkeypatch)
    return tmp_path, model


def write_routed(folder: Path, model: RoutedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    block = type(model.layers[0])
    assert issubclass(block, RoutedBlock)

    def empty(*_: Any) -> nn.Module:
        with torch.device("meta"):
            return RoutedModel(block).eval()

    monkeypatch.setattr(outline, "empty_model", empty)


def routed_groups() -> list[list[str]]:
    groups = []
    for block in range(2):
        prefix = f"layers.{block}."
        groups.append([f"{prefix}mix"])
        experts = [f"{prefix}experts.{index}." for index in range(4)]
        groups += [[f"{expert}gate", f"{expert}up"] for expert in experts]
        groups += [[f"{expert}down"] for expert in experts]
        groups.append([f"{prefix}after"])
    return groups


@pytest.mark.parametrize("strategy", ["one-pass", "recompute"])
def test_experts_that_some_batches_miss(routed: tuple[Path, RoutedModel], strategy: Strategy) -> None:
    folder, model = routed
    method, skeleton = tiny_method(correction=False), Skeleton(folder)
    task, found = tiny_task(skeleton, method)
    batches = make_batches(ROUTED_ROWS, CPU, may_pad=not skeleton.has_routed_layers())
    assert len(batches) == 4
    settings = WalkSettings(CPU, strategy=strategy, experts=ExpertSettings(prior=0))
    Walk(skeleton, CheckpointReader(folder), batches, [task], settings).run()

    expected = true_sequential(model, routed_groups(), ROUTED_ROWS, method, found)
    assert set(found.results) == set(expected)
    assert_same_solution(Collected({name: found.results[name] for name in expected}), expected)
    tokens = [token for row in ROUTED_ROWS for token in row]
    for index in range(4):
        for part in ("gate", "up", "down"):
            result = found.results[f"layers.1.experts.{index}.{part}"]
            assert result.tokens == sum(token // 10 == index for token in tokens)
            assert any("no calibration token reached this layer" in note for note in result.notes) == (index == 3)


def test_a_layer_that_is_called_twice_is_solved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_routed(tmp_path, RoutedModel(RepeatingBlock), monkeypatch)
    rows = routed_rows([(30, [0, 1, 2, 3])] * 6)
    first = walk(tmp_path, rows, tiny_method())
    assert len(first.results) == 2 * (2 + 4 * 3)
    assert_same_bytes(walk(tmp_path, rows, tiny_method(), strategy="recompute"), first)


def test_padding_before_routing_is_refused(routed: tuple[Path, RoutedModel]) -> None:
    folder, _ = routed
    skeleton = Skeleton(folder)
    assert skeleton.has_routed_layers()
    task, _ = tiny_task(skeleton, tiny_method())
    batches = make_batches(ROUTED_ROWS, CPU, may_pad=True)
    with pytest.raises(QuantizationError, match="padding cannot be told from tokens"):
        Walk(skeleton, CheckpointReader(folder), batches, [task], WalkSettings(CPU)).run()


def test_call_order_fits_every_run() -> None:
    names = ["last", "first", "e0", "e1", "e2", "e3"]
    runs = [[["first"], ["e0"], ["last"]], [["first"], ["e2"], ["last"]], [["first"], ["e1"], ["e2"], ["last"]]]
    assert call_order(names, runs) == [["first"], ["e0"], ["e1"], ["e2"], ["e3"], ["last"]]


def test_call_order_takes_no_more_runs_than_it_needs() -> None:
    def runs() -> Iterator[list[list[str]]]:
        yield [["a"], ["b", "c"]]
        raise AssertionError("all layers were seen")

    assert call_order(["a", "b", "c"], runs()) == [["a"], ["b", "c"]]


def test_inputs_are_told_apart_by_identity() -> None:
    linears = {name: nn.Linear(4, 4) for name in "abcd"}
    first, equal = torch.ones(2, 4), torch.ones(2, 4)

    def run() -> None:
        linears["b"](first)
        linears["c"](equal)
        linears["d"](linears["a"](first))
        linears["c"](first)

    layers = {name: Layer(name, name, linear) for name, linear in linears.items()}
    assert shared_inputs(layers, run) == [["b", "a"], ["c"], ["d"]]
    assert not any(linear._forward_pre_hooks for linear in linears.values())


# What goes wrong


def living_passes() -> list[Pass]:
    return [each for each in gc.get_objects() if type(each) is Pass and each]  # isinstance would ask proxies


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def assert_clean_error(
    folder: Path, error: type[Exception], match: str, *, method: Method | None = None, **settings: Any
) -> None:
    """A walk ends with this error, and leaves no paused pass and no hook."""
    skeleton = Skeleton(folder)
    task, _ = tiny_task(skeleton, method or tiny_method())
    batches = make_batches(tiny_rows(), CPU, may_pad=True)
    alive = []
    started = Walk(
        skeleton,
        CheckpointReader(folder),
        batches,
        [task],
        WalkSettings(CPU, **settings),
        lambda *_: alive.append(len(living_passes())),
    )
    with pytest.raises(error, match=match):
        started.run()
    twins = len(batches) if task.method.corrects else 0
    assert alive == [len(batches) + twins], "the error was to come in the second block, with all passes before it"
    assert living_passes() == []
    assert hooks_of(skeleton.model) == 0


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


BROKEN = "model.layers.1.mlp.up_proj.weight"


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[BROKEN][3, 5] = torch.nan


def with_wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[BROKEN] = tensors[BROKEN][:100].contiguous()


def without_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[BROKEN]


@pytest.mark.parametrize("strategy", ["one-pass", "recompute"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (with_nan, rf"{BROKEN}.* is nan at index \[3, 5\]"),
        (with_wrong_shape, rf"{BROKEN} has shape \(100, 64\), the model expects \(128, 64\)"),
        (without_tensor, rf"{BROKEN} is not in the checkpoint"),
    ],
)
def test_broken_checkpoint(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], match: str, strategy: Strategy
) -> None:
    rewrite(make_model(tmp_path), change)
    assert_clean_error(tmp_path, CheckpointError, match, strategy=strategy)


class FailsLate(Spy):
    """Cannot solve the ``count``-th group."""

    def __init__(self, count: int) -> None:
        super().__init__(tiny_method("rtn"))
        self.count = count

    def quantize(
        self, weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme, scale_dtype: torch.dtype
    ) -> Solution:
        if len(self.seen) == self.count - 1:
            raise QuantizationError("it went wrong", "do better")
        return super().quantize(weight, statistics, scheme, scale_dtype)


@pytest.mark.parametrize("settings", [{}, {"strategy": "recompute"}, {"inputs": "float"}])
@pytest.mark.parametrize("count", [5, 6, 8])
def test_unsolvable_layer_is_named(tmp_path: Path, settings: dict[str, str], count: int) -> None:
    layer = LLAMA_GROUPS[count - 5][0]
    match = rf"^variant: model\.layers\.1\.{layer}: it went wrong \(do better\)$"
    assert_clean_error(make_model(tmp_path), QuantizationError, match, method=FailsLate(count), **settings)


def test_an_error_of_the_model_itself_ends_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the model's own error")

    folder = make_model(tmp_path)
    skeleton = Skeleton(folder)
    monkeypatch.setattr(skeleton.blocks[1], "forward", broken)
    task, sink = tiny_task(skeleton, tiny_method())
    batches = make_batches(tiny_rows(), CPU, may_pad=True)
    with pytest.raises(RuntimeError, match="the model's own error"):
        Walk(skeleton, CheckpointReader(folder), batches, [task], WalkSettings(CPU)).run()
    assert sink.segments == ["model.layers.0"]
    assert living_passes() == []
    assert hooks_of(skeleton.model) == 0


def test_a_walk_that_ends_well_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    skeleton = Skeleton(folder)
    task, sink = tiny_task(skeleton, tiny_method(), head=True)
    batches: list[Batch] = make_batches(tiny_rows(), CPU, may_pad=True)
    finished = Walk(skeleton, CheckpointReader(folder), batches, [task], WalkSettings(CPU))
    finished.run()
    results: list[LayerResult] = list(sink.results.values())
    assert len(results) == 15
    assert living_passes() == []
    assert hooks_of(skeleton.model) == 0
    assert all(parameter.is_meta for block in skeleton.blocks for parameter in block.parameters() if parameter.ndim > 1)
