"""Layers make up for what their inputs lost in the layers before them, as far as that generalizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel

from quantkit.engine import batches as batches_module
from quantkit.engine.batches import Batch, make_batches
from quantkit.engine.mismatch import HeldOut, StreamPlace, stream_places
from quantkit.engine.passes import AtSegment
from quantkit.engine.walk import Strategy
from quantkit.methods.base import Method
from quantkit.numerics import mismatch as numbers
from quantkit.numerics.mismatch import Mismatch, corrected
from tests.test_walk import assert_same_bytes
from tests.tiny import VOCABULARY, Collected, make_model, tiny_config, tiny_method, tiny_rows, tiny_steps, walk

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(batches_module.BATCH_TOKENS, "cpu", 512)


def gptq(**options: Any) -> Method:
    return tiny_method("gptq", **({"correction": True} | options))


def shares(found: Collected) -> list[float | None]:
    return [result.correction for result in found.results.values()]


# The weight


def lost(tokens: int, *, related: bool, outputs: bool = False) -> tuple[torch.Tensor, torch.Tensor, Mismatch]:
    """A weight, the Gram matrix of an input, and what that lost: a part that is linear in it, or anything."""
    torch.manual_seed(0)
    inputs, weight = torch.randn(tokens, 16), torch.randn(24, 16)
    mixing = torch.randn(16, 16) / 10
    missing = inputs @ mixing if related else torch.randn(tokens, 16)
    missing = missing @ weight.T if outputs else missing
    held = tokens // 4
    left = inputs[held:]
    cross = left.T @ missing[held:] / len(left)
    return weight, inputs.T @ inputs / tokens, Mismatch(cross, inputs[:held], missing[:held], None, 0.25, outputs)


@pytest.mark.parametrize("outputs", [False, True])
def test_what_is_linear_in_the_input_is_made_up_for(outputs: bool) -> None:
    weight, gram, mismatch = lost(400, related=True, outputs=outputs)
    found, taken = corrected(weight, [8, 16], gram, mismatch)
    assert min(taken) > 0.9
    aims, wholly = mismatch.aims(weight, slice(0, 24), 0), mismatch.inputs @ (found - weight).T
    assert (aims - wholly).square().sum() < 0.02 * aims.square().sum()


def test_what_the_stream_lost_has_a_share_of_its_own() -> None:
    """Of two parts one follows from the input and one does not."""
    weight, gram, related = lost(400, related=True, outputs=True)
    _, _, chance = lost(400, related=False, outputs=True)
    parts = [torch.cat(pair, 1) for pair in ((related.cross, chance.cross), (related.targets, chance.targets))]
    mismatch = Mismatch(parts[0], related.inputs, parts[1], None, 0.25, knows_outputs=True, parts=2)
    found, (taken,) = corrected(weight, [24], gram, mismatch)
    alone, (whole,) = corrected(weight, [24], gram, related)
    assert taken == pytest.approx(whole / 2, abs=0.05), "the mean of nearly all and nearly nothing"
    assert (found - alone).norm() < 0.05 * (alone - weight).norm()


def test_what_has_nothing_to_do_with_the_input_leaves_the_weight_as_it_is() -> None:
    weight, gram, mismatch = lost(64, related=False)
    found, taken = corrected(weight, [24], gram, mismatch)
    assert found is weight
    assert taken == (0.0,)


def test_tokens_that_count_for_nothing_change_nothing() -> None:
    weight, gram, mismatch = lost(400, related=True)
    weights = torch.ones(100)
    weights[50:] = 0.0
    torn = mismatch.targets.clone()
    torn[50:] = 1e3
    known = Mismatch(mismatch.cross, mismatch.inputs, mismatch.targets, weights, 0.25, knows_outputs=False)
    other = Mismatch(mismatch.cross, mismatch.inputs, torn, weights, 0.25, knows_outputs=False)
    assert torch.equal(corrected(weight, [24], gram, known)[0], corrected(weight, [24], gram, other)[0])


# Tokens that are held out


def test_a_quarter_of_the_rows_is_held_out_and_of_few_rows_their_ends() -> None:
    many = make_batches(tiny_rows(16), CPU, may_pad=True)
    held = HeldOut.of(many)
    for batch in many:
        positions = torch.arange(batch.token_ids.numel()) if batch.valid is None else batch.valid
        rows = torch.tensor(batch.rows)[positions // batch.token_ids.shape[1]]
        assert set(rows[held.places[id(batch)]].tolist()) == {row for row in batch.rows if row % 4 == 3}
    (few,) = make_batches([[1] * 8, [1] * 12], CPU, may_pad=True)
    assert HeldOut.of([few]).places[id(few)].tolist() == [9, 10, 11, 12 + 6, 12 + 7]


# The residual stream


def first_block(model: PreTrainedModel) -> tuple[nn.Module, AtSegment]:
    """A model's first block, and what it is given."""
    block = model.get_submodule("gpt_neox.layers.0" if hasattr(model, "gpt_neox") else "model.layers.0")
    seen: list[AtSegment] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(AtSegment(0, args, kwargs))

    hook = block.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.tensor(tiny_rows(1)), use_cache=False)
    hook.remove()
    return block, seen[0]


def found_places(model: PreTrainedModel) -> dict[str, StreamPlace]:
    block, place = first_block(model.eval())
    names = {module: name for name, module in block.named_modules()}
    linears = [module for module in names if isinstance(module, nn.Linear)]
    with torch.no_grad():
        return {names[layer]: where for layer, where in stream_places(block, linears, place).items()}


def test_layers_that_add_to_the_residual_stream_are_found() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    places = found_places(model)
    assert list(places) == ["self_attn.o_proj", "mlp.down_proj"]
    assert places["self_attn.o_proj"] == StreamPlace(0)
    assert places["mlp.down_proj"].module is model.model.layers[0].post_attention_layernorm


def test_layers_whose_output_is_changed_before_it_is_added_are_not_taken_for_such() -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    assert found_places(AutoModelForCausalLM.from_config(config)) == {}
    assert found_places(AutoModelForCausalLM.from_config(tiny_config("gpt_neox"))) == {}


# The walk


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


def divergence(folder: Path, found: Collected, rows: list[list[int]]) -> float:
    """Mean divergence of a solved model from the float model."""
    exact, solved = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    for name, tensor in found.replaced.items():
        solved.get_parameter(name).data = tensor
    for name, result in found.results.items():
        solved.get_submodule(name).weight.data = result.weight.dequantize(torch.float32)
    total = torch.zeros(())
    with torch.no_grad():
        for row in rows:
            first, second = (each(torch.tensor([row])).logits.log_softmax(-1) for each in (exact, solved))
            total += (first.exp() * (first - second)).sum(-1).mean()
    return float(total / len(rows))


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
def test_correction_lowers_the_divergence_on_other_tokens(model: Path, method: str) -> None:
    rows, others = tiny_rows(96), tiny_rows(8, seed=1)
    plain = walk(model, rows, tiny_steps(method, correction=False))
    made_up = walk(model, rows, tiny_steps(method, correction=True))
    assert set(shares(plain)) == {None}
    assert divergence(model, made_up, others) < 0.95 * divergence(model, plain, others)
    assert all(0 <= (each or 0) <= 1 for each in shares(made_up))


def test_strategies_give_the_same_bytes(model: Path) -> None:
    rows = tiny_rows(24)
    first = walk(model, rows, gptq(), head=True)
    assert any(shares(first))
    assert first.results["lm_head"].correction is not None
    found = walk(model, rows, gptq(), head=True, strategy="recompute")
    assert_same_bytes(found, first)
    assert shares(found) == shares(first)


@pytest.mark.parametrize("strategy", ["one-pass", "recompute"])
def test_where_nothing_is_gained_the_bytes_are_those_of_plain_gptq(
    model: Path, monkeypatch: pytest.MonkeyPatch, strategy: Strategy
) -> None:
    monkeypatch.setattr(numbers, "_judged", lambda outputs, _: torch.zeros(len(outputs) + 1))
    found = walk(model, tiny_rows(), gptq(), strategy=strategy)
    assert set(shares(found)) == {0.0}
    assert_same_bytes(found, walk(model, tiny_rows(), gptq(correction=False), strategy=strategy))


def test_what_is_no_batchs_tokens_is_held_out_at_its_end() -> None:
    """As what a model of images makes of a row."""
    (batch,) = make_batches([[1] * 8], CPU, may_pad=True)
    assert HeldOut.of([batch]).among(torch.zeros(20, 2), batch).tolist() == [15, 16, 17, 18, 19]


def test_float_inputs_lost_nothing(model: Path) -> None:
    found = walk(model, tiny_rows(), gptq(), inputs="float")
    assert set(shares(found)) == {None}


def test_the_input_of_the_first_layers_lost_nothing(model: Path) -> None:
    found = walk(model, tiny_rows(24), gptq())
    assert [found.results[f"model.layers.0.self_attn.{name}_proj"].correction for name in "qkv"] == [0.0] * 3


def test_twins_see_the_float_model_whatever_is_solved(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the twins leave at a group of the last block is what the float model gives it."""
    from quantkit.engine.mismatch import MismatchGatherer

    seen: dict[str, list[tuple[Batch, torch.Tensor]]] = {}
    see = MismatchGatherer.see

    def kept(self: MismatchGatherer, values: torch.Tensor, batch: Batch) -> None:
        seen.setdefault(self.name, []).append((batch, values.clone()))
        see(self, values, batch)

    monkeypatch.setattr(MismatchGatherer, "see", kept)
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    outputs: list[torch.Tensor] = []
    exact.model.layers[2].mlp.down_proj.register_forward_hook(lambda *given: outputs.append(given[2]))
    for strategy in ("one-pass", "recompute"):
        seen.clear()
        walk(model, tiny_rows(24), gptq(), strategy=strategy)
        for batch, values in seen["model.layers.2.mlp.down_proj"]:
            outputs.clear()
            with torch.no_grad():
                exact(input_ids=batch.token_ids)
            assert torch.allclose(outputs[0], values, atol=1e-5)
