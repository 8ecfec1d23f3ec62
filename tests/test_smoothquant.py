"""SmoothQuant's factors: large inputs go over into the weights, by as much as lowers the error of what follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.engine.batches import make_batches
from quantkit.engine.statistics import SAMPLED, SAMPLED_EACH, Gatherer
from quantkit.methods.base import InputStatistics, Statistic
from quantkit.numerics.activation_rounding import round_inputs
from quantkit.numerics.smoothing import input_errors
from quantkit.quantization import quantize
from quantkit.schemes import IntScheme
from quantkit.schemes.rounding import InputRounding
from quantkit.system.artifacts import read_json
from quantkit.transforms.awq import AwqFactors
from quantkit.transforms.base import SegmentView, SmoothingPlace
from quantkit.transforms.channel_scales import ChannelScales
from quantkit.transforms.smoothquant import SmoothQuant, SmoothQuantOptions
from tests.test_rotate import job, logits, variant
from tests.tiny import make_model, tiny_method

W8A8 = IntScheme(8, -1, True, activations="dynamic")


def outlying(folder: Path) -> Path:
    """A model some of whose norms make one channel far larger than all others."""
    make_model(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    for name, each in tensors.items():
        if "layernorm" in name:
            each[3] *= 60
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            each[:, 3] /= 60
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["smoothquant", "awq"])
def test_rounded_inputs_lose_less(tmp_path: Path, name: str) -> None:
    model = outlying(tmp_path / "model")
    wanted = logits(model)
    ways: dict[str, list[str]] = {"plain": [], "done": [name]}
    given: dict[str, Any] = {"method": "rtn", "bits": 8, "activations": "dynamic"}
    done = {
        way: quantize(job(model), variant(**given, transforms=transforms), tmp_path / way).folder
        for way, transforms in ways.items()
    }
    lost = {way: (logits(folder) - wanted).norm() for way, folder in done.items()}
    assert lost["done"] < 0.4 * lost["plain"]
    assert all(
        each["places"] for each in read_json(done["done"] / "manifest.json")["transforms"][0]["segments"].values()
    )


def view(inputs: torch.Tensor, weight: torch.Tensor, needs: frozenset[Statistic]) -> SegmentView:
    gathered = Gatherer(needs)
    (batch,) = make_batches([[1] * len(inputs)], torch.device("cpu"), may_pad=False)
    gathered.add(inputs, batch)
    known = {"block.layer": gathered.result()}
    place = SmoothingPlace(("block.layer",), "block.norm")
    return SegmentView(
        "block", [place], {"block.layer": W8A8}, torch.float32, lambda _: weight, known, tiny_method("rtn")
    )


def test_a_given_exponent_makes_the_papers_factors() -> None:
    inputs, weight = torch.randn(40, 16) * (1 + 20 * torch.rand(16)), torch.randn(8, 16)
    smooth = SmoothQuant(SmoothQuantOptions(alpha=0.5))
    change = smooth.of_segment(view(inputs, weight, smooth.needs))
    assert isinstance(change, ChannelScales)
    expected = 1 / (inputs.abs().amax(0).sqrt() / weight.abs().amax(0).sqrt())
    found = 1 / change.columns["block.layer"]
    torch.testing.assert_close(found / found[0], expected / expected[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", [SmoothQuant, AwqFactors])
def test_the_exponent_is_that_of_least_error_with_the_rounding_of_inputs(kind: type[SmoothQuant | AwqFactors]) -> None:
    inputs, weight = torch.randn(64, 16), torch.randn(24, 16)
    inputs[:, 2] *= 100
    transform = kind(kind.Options())
    change = transform.of_segment(view(inputs, weight, transform.needs))
    assert isinstance(change, ChannelScales)
    factors = change.columns["block.layer"]
    rounding = W8A8.input_rounding
    assert rounding is not None
    lost = input_errors(weight, inputs, rounding, [torch.ones(16), factors])
    assert factors.argmax() == 2
    assert lost[1] < 0.2 * lost[0]


@pytest.mark.parametrize("static", [False, True])
def test_the_error_of_rounded_inputs_is_that_of_the_outputs(static: bool) -> None:
    inputs, weight, factors = torch.randn(30, 16), torch.randn(5, 16), 0.5 + torch.rand(16)
    rounding = InputRounding("int8", static=static)
    divided = inputs / factors
    scale = divided.abs().amax().reshape(1) / 127 if static else None
    off = (round_inputs(divided, rounding, scale) * factors - inputs) @ weight.T
    (found,) = input_errors(weight, inputs, rounding, [factors])
    torch.testing.assert_close(found, off.square().sum() / 30)


def test_a_sample_and_the_largest_inputs_are_gathered() -> None:
    gathered, other = (Gatherer(frozenset({Statistic.SAMPLE, Statistic.ABS_MAX})) for _ in range(2))
    rows = make_batches([[1] * 200] * 10, torch.device("cpu"), may_pad=False, limit=200)
    inputs = [torch.randn(200, 8) for _ in rows]
    for batch, each in zip(rows, inputs, strict=True):
        gathered.add(each, batch)
        other.absorb(other.of_batch(each, batch))  # as another process would
    found, elsewhere = gathered.result(), other.result()
    assert found.sample is not None
    assert found.abs_max is not None
    assert elsewhere.sample is not None
    assert elsewhere.abs_max is not None
    assert torch.equal(found.sample, elsewhere.sample)
    assert torch.equal(found.abs_max, elsewhere.abs_max)
    assert 50 < SAMPLED_EACH < 200
    assert torch.equal(found.sample[:50], inputs[0][::4])
    assert len(found.sample) <= SAMPLED
    assert torch.equal(found.abs_max, torch.cat(inputs).abs().amax(0))
    assert InputStatistics().is_empty()
    assert not found.is_empty()
