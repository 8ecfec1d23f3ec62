"""Block polish: held-out batches say what is kept, and a walk tunes what it solved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantkit.engine.batches import Batch
from quantkit.engine.passes import AtSegment
from quantkit.engine.tuning import Example, Polish, divided
from quantkit.errors import QuantizationError
from quantkit.exports import open_export
from quantkit.methods.base import InputStatistics
from quantkit.methods.rtn import Rtn, RtnOptions
from quantkit.methods.tuning import ROUNDED_STEPS, STEPS, TuneOptions
from quantkit.quantization import Job, Quantized, quantize, quantize_together
from quantkit.quantization.job import Wanted
from quantkit.quantization.stage import walks
from quantkit.recipe import VariantSpec
from quantkit.schemes import QuantizedWeight
from quantkit.schemes.integer import IntScheme
from quantkit.system.artifacts import file_sha256
from tests.architectures import make as make_architecture
from tests.tiny import make_model, tiny_rows


class Block(nn.Module):
    """A norm and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, given: torch.Tensor) -> tuple[torch.Tensor]:
        return (given + self.down(torch.tanh(self.up(self.norm(given)))),)


def rounded(weight: torch.Tensor, bits: int = 3, **keys: Any) -> QuantizedWeight:
    scheme = IntScheme(bits=bits, group_size=16, **keys)
    return Rtn(RtnOptions()).quantize(weight.detach(), InputStatistics(), scheme, torch.float32).weight


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    found = Block().requires_grad_(False)
    found.up.weight.mul_(4)
    return found


def examples(block: Block, count: int = 24) -> list[Example]:
    """Batches of 12 tokens, of which the last four are padding with numbers that would spoil every mean."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        given = torch.randn(3, 4, 32, generator=draw)
        given[2] = 1e4
        target = block(given)[0]
        batch = Batch(torch.zeros(3, 4, dtype=torch.int64), torch.arange(8))
        found.append(Example(batch, AtSegment(0, (given,), {}), target))
    return found


def polished(block: Block, given: list[Example], weight: dict[str, QuantizedWeight] | None = None, **keys: Any) -> Any:
    weights = {"up.weight": rounded(block.up.weight), "down.weight": rounded(block.down.weight)}
    options = TuneOptions(**{"steps": 40, "learning_rate": 0.01, "held_out": 0.1, "rounding": False, **keys})
    names = {"norms": ("norm.weight", "norm.bias"), "biases": ("up.bias",)}
    floats = {name: block.get_parameter(name).data for kind in options.train for name in names.get(kind, ())}
    origins = {name: block.get_parameter(name).data for name in weight or weights}
    return Polish(block, weight or weights, floats, options, given, origins).run()


def test_scales_are_trained_and_codes_stay(block: Block) -> None:
    before = {name: each.clone() for name, each in block.state_dict().items()}
    done = polished(block, examples(block))
    assert done.paid
    assert (done.steps, done.note) == (40, "")
    assert 0 < done.after < 0.95 * done.before
    first = rounded(block.up.weight)
    assert torch.equal(done.weights["up.weight"].codes, first.codes)
    assert not torch.equal(done.weights["up.weight"].scales, first.scales)
    assert not done.floats
    assert all(torch.equal(each, before[name]) for name, each in block.state_dict().items())


def test_the_error_is_that_of_the_stored_weights_over_what_the_block_adds(block: Block) -> None:
    given = examples(block)
    done = polished(block, given)
    held, _ = divided(given, 0.1)
    one, two = held
    block.up.weight.data = done.weights["up.weight"].dequantize(torch.float32)
    block.down.weight.data = done.weights["down.weight"].dequantize(torch.float32)
    off = sum((block(each.place.args[0])[0] - each.target)[:2].square().mean() for each in (one, two))
    added = sum((each.target - each.place.args[0])[:2].square().mean() for each in (one, two))
    assert done.after == pytest.approx(float(off / added), rel=1e-4)


def test_twice_is_the_same(block: Block) -> None:
    one, two = (polished(block, examples(block), train=("scales", "norms")) for _ in range(2))
    assert torch.equal(one.weights["up.weight"].scales, two.weights["up.weight"].scales)
    assert torch.equal(one.floats["norm.weight"], two.floats["norm.weight"])


def test_norms_and_biases_come_near_a_shifted_target(block: Block) -> None:
    plain = polished(block, examples(block), train=("scales",))
    more = polished(block, examples(block), train=("scales", "norms", "biases"))
    assert set(more.floats) == {"norm.weight", "norm.bias", "up.bias"}
    assert more.after < plain.after


def test_without_scales_only_what_was_asked_for_changes(block: Block) -> None:
    done = polished(block, examples(block), train=("norms",))
    assert set(done.floats) == {"norm.weight", "norm.bias"}
    assert not done.weights


def test_roundings_are_trained_by_signs(block: Block) -> None:
    weights = {"up.weight": rounded(block.up.weight, 2), "down.weight": rounded(block.down.weight, 2)}
    done = polished(block, examples(block), weights, train=(), rounding=True)
    assert done.after < done.before
    changed = done.weights["up.weight"].codes != weights["up.weight"].codes
    assert 0 < changed.float().mean() < 0.5
    assert torch.equal(done.weights["up.weight"].scales, weights["up.weight"].scales)


def test_roundings_are_trained_by_themselves_where_tokens_are_many(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = polished(block, examples(block), rounding=None)
    monkeypatch.setattr("quantkit.methods.tuning.ROUNDING_TOKENS", 3)
    many = polished(block, examples(block), rounding=None)
    assert torch.equal(few.weights["up.weight"].codes, rounded(block.up.weight).codes)
    assert not torch.equal(many.weights["up.weight"].codes, rounded(block.up.weight).codes)
    assert many.after < few.after


def test_roundings_take_more_steps_than_scales_alone_unless_it_is_said_how_many(block: Block) -> None:
    usual, few = TuneOptions(), TuneOptions(steps=3)
    assert (usual.steps_for(rounding=False), usual.steps_for(rounding=True)) == (STEPS, ROUNDED_STEPS)
    assert {few.steps_for(rounding=each) for each in (False, True)} == {3}
    assert not usual.rounds(tokens=127 * 64, width=64)
    assert usual.rounds(tokens=128 * 64, width=64)
    assert polished(block, examples(block), steps=None).steps <= STEPS


def test_float_zeros_are_trained(block: Block) -> None:
    keys = {"symmetric": False, "zeros": "float"}
    weights = {"up.weight": rounded(block.up.weight, 2, **keys)}
    done = polished(block, examples(block), weights)
    assert not torch.equal(done.weights["up.weight"].zeros, weights["up.weight"].zeros)
    assert done.after < done.before


def test_what_held_out_batches_do_not_like_is_left_alone(block: Block) -> None:
    given = examples(block)
    held, train = divided(given, 0.1)
    spoilt = [Example(each.batch, each.place, -each.target) for each in train]
    order = [each if any(each is h for h in held) else spoilt.pop(0) for each in given]
    done = polished(block, order, learning_rate=0.5, patience=1)
    assert not done.paid
    assert done.after == done.before
    assert done.steps == 10


def test_a_loss_that_is_not_finite_ends_with_the_best(block: Block) -> None:
    given = examples(block)
    _, train = divided(given, 0.1)
    place = next(number for number, each in enumerate(given) if each is train[2])
    calls = {"steps": 0}

    def breaks(module: nn.Module, args: Any, output: Any) -> Any:
        same = args[0] is given[place].place.args[0]
        calls["steps"] += same
        return (output[0] * float("nan"),) if same and calls["steps"] > 1 else None

    hook = block.register_forward_hook(breaks)
    done = polished(block, given, steps=40)
    hook.remove()
    assert done.steps == 25
    assert done.paid
    assert "step 25 was not finite" in done.note


def test_some_are_held_out_and_some_are_not() -> None:
    block = Block()
    for count, share, wanted in ((2, 0.125, 1), (3, 0.9, 2), (16, 0.125, 2), (9, 0.125, 1)):
        held, train = divided(examples(block, count), share)
        assert (len(held), len(train)) == (wanted, count - wanted)


# In a walk


def run(model: Path, out: Path, *, inputs: str = "quantized", **keys: Any) -> Quantized:
    return quantize(job_of(model, inputs), variant(**keys), out)


def job_of(model: Path, inputs: Any) -> Job:
    facts = {"reference": "tiny"}
    return Job(model, facts, "float32", rows=tiny_rows(), calibration_sha256="0" * 64, device="cpu", inputs=inputs)


def variant(name: str = "v", **keys: Any) -> VariantSpec:
    quick = {"bits": 3, "group_size": 32, "tune": {"steps": 8, "learning_rate": 0.02}}
    return VariantSpec.model_validate({"name": name, **quick, **keys})


def scales(done: Quantized) -> dict[str, torch.Tensor]:
    export = open_export(done.folder)
    return {name: export.weight(name).scales for name in export.schemes}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("method", ["gptq", "rtn", "awq"])
@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_a_walk_tunes_each_block(llama: Path, tmp_path: Path, method: str, inputs: str) -> None:
    done = run(llama, tmp_path / "out", method=method, inputs=inputs)
    tuning = done.facts["tuning"]
    assert len(tuning) == 2
    assert any(each["paid"] for each in tuning) or (method, inputs) == ("gptq", "quantized")
    assert all(0 < each["after"] <= each["before"] and each["steps"] >= 6 for each in tuning)


@pytest.mark.parametrize("train", [["scales"], ["scales", "norms"]])
def test_a_run_that_was_cut_short_goes_on_with_the_same_bytes(llama: Path, tmp_path: Path, train: list[str]) -> None:
    def stop(done: int, _total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    job = job_of(llama, "quantized")
    asked = variant(method="rtn", tune={"steps": 8, "learning_rate": 0.02, "train": train})
    whole = quantize(job, asked, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        quantize(job, asked, tmp_path / "cut", on_segment=stop)
    done = quantize(job, asked, tmp_path / "cut")
    assert done.facts["resumed"] == 1
    assert done.facts["tuning"] == whole.facts["tuning"]
    assert all(each["paid"] for each in whole.facts["tuning"])
    for file in whole.folder.glob("*.safetensors"):
        assert file_sha256(file) == file_sha256(done.folder / file.name)


def test_variants_of_a_float_walk_do_not_see_one_another(llama: Path, tmp_path: Path) -> None:
    job = job_of(llama, "float")
    three = [variant("plain", tune=None), variant("tuned"), variant("norms", tune={"steps": 8, "train": ["norms"]})]
    groups = walks(job, three)
    assert groups == [[0], [1, 2]]
    together: list[Any] = []
    for places in groups:
        together += quantize_together(job, [Wanted(three[place], tmp_path / three[place].name) for place in places])
    for each, done in zip(three, together, strict=True):
        assert isinstance(done, Quantized)
        alone = quantize(job, each, tmp_path / f"{each.name}-alone")
        name = next(path.name for path in alone.folder.glob("*.safetensors"))
        assert file_sha256(alone.folder / name) == file_sha256(done.folder / name)


def test_experts_are_tuned(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_architecture(model, "mixtral")
    first, tuned = run(model, tmp_path / "first", tune=None), run(model, tmp_path / "tuned")
    before, after = scales(first), scales(tuned)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("experts" in name for name in changed)


def test_blocks_that_share_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    from quantkit.engine.skeleton import Skeleton

    monkeypatch.setattr(Skeleton, "runs_once", property(lambda _: False))
    with pytest.raises(QuantizationError, match="leave out tune"):
        run(llama, tmp_path / "out")
