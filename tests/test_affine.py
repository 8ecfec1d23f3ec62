"""AffineQuant: what is learned leaves the float model as it is, and lowers the error of a block's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.engine.tasks import SavedChange
from quantkit.methods.base import InputStatistics
from quantkit.quantization import quantize
from quantkit.quantization.stage import walks
from quantkit.schemes import IntScheme
from quantkit.system.artifacts import file_sha256, read_json
from quantkit.transforms.affine import AffineQuant
from quantkit.transforms.affine_change import Affine
from quantkit.transforms.affine_learning import AffineOptions, rounded, shares_of
from quantkit.transforms.base import SmoothingPlace
from quantkit.transforms.channel_scales import ChannelScales
from tests.test_rotate import job, logits, variant, with_norms
from tests.test_transforms import cut_after
from tests.tiny import make_model, tiny_method

AFFINE: dict[str, Any] = {"transforms": [{"name": "affine", "steps": 12, "alphas": 4, "learning_rate": 0.02}]}


def change() -> Affine:
    scales = ChannelScales(places=2)
    scales.add(SmoothingPlace(("v", "q"), "norm"), 0.5 + torch.rand(12))
    matrices = torch.eye(4) + 0.2 * torch.randn(2, 4, 4)
    return Affine(scales, {"v": matrices}, {"o": "v"}, {"o": torch.tensor([0, 0, 1, 1])}, {"before": 2.0, "after": 1.0})


def test_heads_are_mixed_and_mixed_back() -> None:
    """Each head of values is read by two heads, as in attention whose heads share them."""
    found, inputs = change(), torch.randn(30, 12)
    weights = {"v": torch.randn(8, 12), "o": torch.randn(5, 16)}
    attention = torch.randn(4, 30, 30)

    def computed(parts: dict[str, torch.Tensor], given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = (given @ parts["v"].T + parts["bias"]).view(30, 2, 4)
        read = torch.stack([attention[head] @ values[:, head // 2] for head in range(4)], 1).reshape(30, 16)
        return read @ parts["o"].T, read

    parts = weights | {"bias": torch.randn(8)}
    changed = {name: found.apply(name, "weight", each) for name, each in weights.items()}
    changed["bias"] = found.apply("v", "bias", parts["bias"])
    before, read = computed(parts, inputs)
    after, mixed = computed(changed, inputs / found.scales.columns["v"])
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    known = InputStatistics(30, read.abs().mean(0), read.square().mean(0), read.T @ read / 30, sample=read)
    told = found.statistics("o", known)
    assert told.gram is not None
    torch.testing.assert_close(told.gram, mixed.T @ mixed / 30, rtol=1e-3, atol=1e-3)
    assert told.abs_mean is not None
    torch.testing.assert_close(told.abs_mean, mixed.abs().mean(0), rtol=1e-3, atol=1e-3)
    saved = SavedChange.of(found)
    assert saved is not None
    again = AffineQuant(AffineOptions()).restore(saved.tensors, saved.data)
    assert torch.equal(again.apply("o", "weight", weights["o"]), changed["o"])
    assert again.to_json() == found.to_json()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_rounded_weight_is_that_of_the_grid_and_has_gradients(symmetric: bool) -> None:
    weight, scheme = torch.randn(6, 32, requires_grad=True), IntScheme(2, 16, symmetric)
    method = tiny_method("rtn", range="search")
    shares = shares_of(weight.detach(), InputStatistics(), scheme, torch.float32, method)
    found = rounded(weight, scheme, torch.float32, shares)
    spanning = rounded(weight, scheme, torch.float32, torch.ones_like(shares))
    assert (found - weight).square().sum() < (spanning - weight).square().sum()
    assert (found - weight).abs().max() < weight.abs().max()
    assert all(len(group.unique()) <= 4 for group in (found.detach() * 1e4).round().view(-1, 16))
    torch.autograd.backward((found * torch.randn(6, 32)).sum())
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("inputs", ["float", "quantized"])
def test_what_is_learned_lowers_the_error_of_blocks(tmp_path: Path, inputs: str) -> None:
    model = with_norms(make_model(tmp_path / "model", "llama"))
    done = quantize(job(model, inputs), variant(method="rtn", bits=3, **AFFINE), tmp_path / "done")
    segments = read_json(done.folder / "manifest.json")["transforms"][0]["segments"]
    assert all(each["after"] < 0.98 * each["before"] for each in segments.values())
    assert all(list(each["readers"].values()) == [f"{name}.self_attn.v_proj"] for name, each in segments.items())
    assert any("affine bettered 2 of 2 blocks" in note for note in done.facts["notes"])
    wanted = logits(model)
    eight = quantize(job(model, inputs), variant(method="rtn", bits=8, **AFFINE), tmp_path / "eight").folder
    assert (logits(eight) - wanted).norm() < 0.05 * wanted.norm()


def test_a_run_that_was_cut_short_gives_the_same_bytes(tmp_path: Path) -> None:
    model, spec = make_model(tmp_path / "model", "llama"), variant(method="gptq", **AFFINE)
    whole = quantize(job(model), spec, tmp_path / "whole" / "out").folder
    with pytest.raises(KeyboardInterrupt):
        quantize(job(model), spec, tmp_path / "cut" / "out", on_segment=cut_after(1))
    done = quantize(job(model), spec, tmp_path / "cut" / "out")
    assert done.facts["resumed"] == 1
    assert file_sha256(whole / "model.safetensors") == file_sha256(done.folder / "model.safetensors")


def test_it_has_a_walk_of_its_own_with_float_inputs(tmp_path: Path) -> None:
    given = [variant(transforms=[]), variant(**AFFINE), variant(bits=3, **AFFINE)]
    assert walks(job(tmp_path, "float"), given) == [[0], [1, 2]]
