"""Transforms of any number come before a method, from another package too; the float model computes what it did."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.engine.tasks import SavedChange
from quantkit.errors import QuantizationError
from quantkit.exports import open_export
from quantkit.quantization import Job, quantize
from quantkit.recipe import VariantSpec
from quantkit.system import registry
from quantkit.system.artifacts import file_sha256, read_json
from quantkit.transforms import TRANSFORMS
from quantkit.transforms.awq import AwqFactors, AwqFactorsOptions
from quantkit.transforms.base import Change, Changes, ModelView, SmoothingPlace, Transform
from quantkit.transforms.channel_scales import ChannelScales
from tests.runs import load_model
from tests.sample_transform import Reordered
from tests.tiny import make_model, tiny_rows

BLOCKS = 3


@pytest.fixture(autouse=True)
def _another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with one file is installed, whose entry point names the transform."""
    monkeypatch.setattr(TRANSFORMS, "_entries", {})
    monkeypatch.setattr(TRANSFORMS, "_loaded", False)
    point = EntryPoint("reorder", "tests.sample_transform:Reorder", "quantkit.transforms")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    TRANSFORMS.register(AwqFactors)


def model_in(folder: Path, **changes: Any) -> Path:
    return make_model(folder, "qwen2", num_hidden_layers=BLOCKS, **changes)


def job(model: Path, inputs: Any = "quantized") -> Job:
    return Job(model, {"reference": "tiny"}, "float32", tiny_rows(), "0" * 64, inputs, "cpu")


def variant(**keys: Any) -> VariantSpec:
    return VariantSpec.model_validate({"name": "v", "group_size": 32, **keys})


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(folder, "reference")(torch.tensor([tiny_rows()[0]])).logits
    return found


def order(width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


def reordered(model: Path, out: Path) -> Path:
    """The same model with its channels in the order, as a checkpoint of its own."""
    out.mkdir()
    for path in model.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    modules = [name.rpartition(".")[0] for name in tensors]
    change = Reordered(order(), [name for name in modules if not name.endswith(("q_norm", "k_norm"))])
    changed = {name: change.apply(*_split(name), tensor).contiguous() for name, tensor in tensors.items()}
    save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _split(parameter: str) -> tuple[str, str]:
    module, _, leaf = parameter.rpartition(".")
    return module, leaf


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "keys",
    [
        {"ignore": [r"layers\.[12]\.", "gate_proj|up_proj", "lm_head"]},
        {"ignore": []},
        {"embeddings": {"bits": 8, "group_size": -1}, "ignore": ["lm_head"]},
    ],
    ids=["some layers", "all layers", "embedding"],
)
def test_a_transform_of_the_whole_model_leaves_what_it_computes(
    tmp_path: Path, tied: bool, keys: dict[str, Any]
) -> None:
    """Rounded by rows, a layer is the same in any order of its channels; whatever went astray would show as noise."""
    model = model_in(tmp_path / "model", tie_word_embeddings=tied)
    given = {"method": "rtn", "bits": 8, "group_size": -1, **keys}
    plain = quantize(job(model), variant(**given), tmp_path / "plain").folder
    done = quantize(job(model), variant(**given, transforms=["reorder"]), tmp_path / "done").folder
    torch.testing.assert_close(logits(done), logits(plain), rtol=1e-4, atol=1e-4)
    name = "model.layers.0.self_attn.q_proj"
    before, after = (open_export(folder).weight(name).codes for folder in (plain, done))
    assert torch.equal(after, before[:, order()])
    assert not torch.equal(after, before)


@pytest.mark.parametrize("inputs", ["float", "quantized"])
@pytest.mark.parametrize("after", [[], ["awq"]], ids=["alone", "before awq"])
def test_a_method_sees_the_model_that_a_transform_made(tmp_path: Path, inputs: str, after: list[str]) -> None:
    """Solved behind the transform is solved on a checkpoint that was changed before.

    Asymmetric, as a symmetric grid puts the largest weight of a group half-way between two levels.
    """
    model = model_in(tmp_path / "model")
    keys: dict[str, Any] = {"method": "gptq", "activation_order": False, "symmetric": False, "ignore": []}
    other = reordered(model, tmp_path / "reordered")
    expected = quantize(job(other, inputs), variant(**keys, transforms=after), tmp_path / "expected").folder
    found = quantize(job(model, inputs), variant(**keys, transforms=["reorder", *after]), tmp_path / "found").folder
    assert (logits(found) - logits(expected)).abs().mean() < 0.02
    exports = [open_export(folder) for folder in (found, expected)]
    for layer in read_json(found / "manifest.json")["layers"]:
        codes = [export.weight(layer).codes for export in exports]
        assert (codes[0] != codes[1]).float().mean() < 0.01, layer  # the order of float sums may flip a few
    differently = quantize(job(model, inputs), variant(**keys, transforms=after), tmp_path / "other").folder
    wrong = open_export(differently).weight("model.layers.1.mlp.up_proj").codes
    assert (wrong != exports[0].weight("model.layers.1.mlp.up_proj").codes).float().mean() > 0.3


def cut_after(blocks: int) -> Callable[[int, int], None]:
    def on_segment(done: int, total: int) -> None:
        if done == blocks:
            raise KeyboardInterrupt

    return on_segment


@pytest.mark.parametrize("blocks", [1, 2, BLOCKS])
@pytest.mark.parametrize(
    "keys", [{}, {"embeddings": {"bits": 8}, "ignore": ["lm_head", r"layers\.0"]}], ids=["plain", "embedding"]
)
def test_transforms_survive_that_a_run_is_cut_short(tmp_path: Path, blocks: int, keys: dict[str, Any]) -> None:
    model = model_in(tmp_path / "model")
    spec = variant(method="gptq", transforms=[{"name": "reorder", "seed": 3}, {"name": "awq", "alphas": 6}], **keys)
    whole = quantize(job(model), spec, tmp_path / "whole" / "out").folder
    with pytest.raises(KeyboardInterrupt):
        quantize(job(model), spec, tmp_path / "cut" / "out", on_segment=cut_after(blocks))
    done = quantize(job(model), spec, tmp_path / "cut" / "out")
    assert done.facts["resumed"] > 0
    for path in whole.iterdir():
        if path.name != "stage.json":
            assert file_sha256(path) == file_sha256(done.folder / path.name), path.name


def test_the_manifest_says_what_each_transform_did(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    spec = variant(method="gptq", transforms=["reorder", {"name": "awq", "alphas": 6}])
    found = read_json(quantize(job(model), spec, tmp_path / "out").folder / "manifest.json")["transforms"]
    reorder, awq = found
    assert (reorder["name"], reorder["options"], reorder["segments"]) == ("reorder", {"seed": 0}, {})
    assert reorder["model"]["modules"] > 20
    assert (awq["name"], awq["options"], awq["model"]) == ("awq", {"alphas": 6, "duo_scaling": True}, None)
    assert list(awq["segments"]) == [f"model.layers.{block}" for block in range(BLOCKS)]
    assert all(each["places"] == 4 for each in awq["segments"].values())


@pytest.mark.parametrize("inputs", ["float", "quantized"])
def test_ways_to_say_the_same_give_the_same_bytes(tmp_path: Path, inputs: str) -> None:
    model = model_in(tmp_path / "model")
    ways: list[dict[str, Any]] = [
        {"method": "awq+gptq", "alphas": 6},
        {"method": "gptq", "transforms": [{"name": "awq", "alphas": 6}]},
        {"method": "gptq", "transforms": [{"name": "awq", "options": {"alphas": 6}}]},
    ]
    folders = [
        quantize(job(model, inputs), variant(**keys), tmp_path / str(place)).folder for place, keys in enumerate(ways)
    ]
    assert len({file_sha256(folder / "model.safetensors") for folder in folders}) == 1
    assert variant(method="awq+gptq").chain == variant(method="gptq", transforms=["awq"]).chain == "awq+gptq"


class OneOfTwo(Transform):
    """Changes the head and not the embedding."""

    name: ClassVar[str] = "one-of-two"

    def of_model(self, model: ModelView) -> Change | None:
        return ChannelScales({"lm_head": torch.full((64,), 2.0)}, {"model.norm": (torch.full((64,), 0.5), 0.0)})


@pytest.mark.parametrize("ignore", [[], ["lm_head"]], ids=["head quantized", "head float"])
def test_a_head_and_an_embedding_that_share_a_weight_are_two_once_one_is_changed(
    tmp_path: Path, ignore: list[str]
) -> None:
    TRANSFORMS.register(OneOfTwo)
    model = model_in(tmp_path / "model", tie_word_embeddings=True)
    spec = variant(method="rtn", bits=8, transforms=["one-of-two"], ignore=ignore)
    done = quantize(job(model), spec, tmp_path / "out").folder
    plain = quantize(job(model), variant(method="rtn", bits=8, ignore=ignore), tmp_path / "plain").folder
    torch.testing.assert_close(logits(done), logits(plain), rtol=1e-4, atol=1e-4)
    assert not read_json(done / "config.json")["tie_word_embeddings"]


class Broken(Transform):
    """Doubles the head alone."""

    name: ClassVar[str] = "broken"

    def of_model(self, model: ModelView) -> Change | None:
        return ChannelScales({"lm_head": torch.full((64,), 2.0)})


def test_a_transform_that_changes_what_the_model_computes_is_refused(tmp_path: Path) -> None:
    TRANSFORMS.register(Broken)
    with pytest.raises(
        QuantizationError, match=r"broken changes what the float model computes: logits differ by 1\.0e"
    ):
        quantize(job(model_in(tmp_path / "model")), variant(method="rtn", transforms=["broken"]), tmp_path / "out")


def test_awq_says_where_it_scaled_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_in(tmp_path / "model")
    usual = quantize(job(model), variant(method="awq"), tmp_path / "usual")
    assert not any("awq scaled nothing" in note for note in usual.facts["notes"])
    monkeypatch.setattr(AwqFactors, "factors", lambda *_: None)
    done = quantize(job(model), variant(method="awq"), tmp_path / "gains")
    expected = f"awq scaled nothing in this model: no factors lowered the error of any of {4 * BLOCKS} inputs"
    assert expected in done.facts["notes"]
    monkeypatch.setattr("quantkit.engine.smoothing.SmoothingFinder.find", lambda _: [])
    done = quantize(job(model), variant(method="awq"), tmp_path / "places")
    assert "awq scaled nothing in this model: no input of it can be scaled" in done.facts["notes"]


def test_changes_are_restored_from_tensors_and_json() -> None:
    place = SmoothingPlace(("q", "k"), "norm", 1.0)
    change = ChannelScales(places=1)
    change.add(place, torch.rand(8) + 0.5)
    saved = SavedChange.of(change)
    assert saved is not None
    again = AwqFactors(AwqFactorsOptions()).restore(saved.tensors, saved.data)
    for module, shape in (("q", (4, 8)), ("norm", (8,)), ("other", (3, 8))):
        parameter = torch.randn(shape)
        assert torch.equal(again.apply(module, "weight", parameter), change.apply(module, "weight", parameter))
    assert Changes((again, change)).touches() == ["q", "k", "norm"]
    assert SavedChange.of(None) is None
