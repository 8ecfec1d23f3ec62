"""Rotations of the residual stream and of heads: the float model computes what it did, and rounding hurts less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.checkpoint import CheckpointReader
from quantkit.engine.equality import largest_difference
from quantkit.engine.originals import Originals
from quantkit.engine.skeleton import Skeleton
from quantkit.engine.transforming import Transforming, _Model
from quantkit.errors import QuantizationError, QuantkitError
from quantkit.exports import open_export
from quantkit.quantization import Job, quantize
from quantkit.quantization.stage import walks
from quantkit.recipe import VariantSpec
from quantkit.system.artifacts import file_sha256, read_json
from quantkit.system.validation import parse_section
from quantkit.transforms.base import Changes
from quantkit.transforms.rotate import Rotate, RotateOptions, Rotation
from tests.architectures import make
from tests.runs import load_model
from tests.test_transforms import cut_after
from tests.tiny import make_model, tiny_rows


def with_norms(folder: Path) -> Path:
    """The model with norms that multiply channels by something."""
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(folder / "model.safetensors")
    for name, each in tensors.items():
        if each.ndim == 1 and name.endswith("weight"):
            tensors[name] = each + 0.5 * torch.rand(each.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rotated(folder: Path, **options: Any) -> tuple[Originals, Rotation]:
    originals = Originals(Skeleton(folder), CheckpointReader(folder), torch.device("cpu"))
    change = Rotate(RotateOptions(**options)).of_model(_Model(Transforming(originals, True), Changes()))
    assert isinstance(change, Rotation)
    return originals, change


BOTH, STREAM, HEADS = ["residual", "values"], ["residual"], ["values"]
FAMILIES = {
    "gemma": (BOTH, ""),
    "gpt2": (STREAM, ""),  # c_attn gives queries, keys and values
    "phi": (BOTH, ""),
    "cohere": (BOTH, ""),
    "mixtral": (BOTH, ""),
    "lfm2": (BOTH, ""),
    "llama4_text": (BOTH, ""),
    "gpt_oss": (HEADS, "the biases of model.layers.0.mlp.experts.0.down_proj and its like lie in a tensor"),
    "gemma2": (HEADS, "model.layers.0.post_attention_layernorm scales what is added to it, channel by channel"),
    "llava": (HEADS, "makes of images or sound is written to it"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_what_they_are(tmp_path: Path, family: str) -> None:
    turned, why = FAMILIES[family]
    make_model(tmp_path, "gemma") if family == "gemma" else make(tmp_path, family)
    originals, change = rotated(with_norms(tmp_path))
    assert change.told["turned"] == turned
    assert all(why in each for each in change.told["left"][: bool(why)])
    assert change.inputs
    assert largest_difference(originals, change) < 1e-5


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("bloom", "transformer.word_embeddings_layernorm scales what is added to it, channel by channel"),
        ("zamba", "blocks share weights or run again and again"),
    ],
)
def test_what_cannot_be_turned_is_refused_by_name(tmp_path: Path, family: str, why: str) -> None:
    make(tmp_path, family)
    with pytest.raises(QuantizationError, match=f"rotate turns nothing in this model: the residual stream: {why}"):
        rotated(with_norms(tmp_path))


def test_a_width_without_a_hadamard_matrix_gets_a_random_one_and_says_so(tmp_path: Path) -> None:
    folder = with_norms(make_model(tmp_path / "model", "llama", hidden_size=52))
    originals, change = rotated(folder)
    assert largest_difference(originals, change) < 1e-5
    note = "rotate: no Hadamard matrix of size 52 is known here: random ones"
    assert note in Rotate(RotateOptions()).model_notes(change.told)


def test_a_rotation_of_nothing_is_refused_with_the_recipe() -> None:
    with pytest.raises(QuantkitError, match="nothing is turned"):
        parse_section(
            VariantSpec, {"name": "v", "transforms": [{"name": "rotate", "residual": False, "values": False}]}, "test"
        )


def job(model: Path, inputs: Any = "quantized") -> Job:
    return Job(model, {"reference": "tiny"}, "float32", tiny_rows(), "0" * 64, inputs, "cpu")


def variant(**keys: Any) -> VariantSpec:
    return VariantSpec.model_validate({"name": "v", "group_size": -1, "transforms": ["rotate"], **keys})


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(folder, "reference")(torch.tensor([tiny_rows()[0]])).logits
    return found


@pytest.mark.parametrize("keys", [{}, {"ignore": []}, {"embeddings": {"bits": 8}}], ids=["usual", "head", "embedding"])
def test_a_tied_embedding_is_two_weights_in_the_file(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = with_norms(make_model(tmp_path / "model", "qwen2", tie_word_embeddings=True))
    done = quantize(job(model), variant(method="rtn", bits=8, **keys), tmp_path / "out").folder
    assert read_json(done / "config.json")["tie_word_embeddings"] is False
    float_model = logits(model)
    assert (logits(done) - float_model).norm() < 0.05 * float_model.norm()
    told = read_json(done / "manifest.json")["transforms"][0]
    assert told["model"] == {"turned": BOTH, "left": [], "matrices": {"64": "hadamard", "16": "hadamard"}}


def outlying(folder: Path) -> Path:
    """A model whose layers have a channel with far larger weights than all others."""
    make_model(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    for name, each in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            each[:, 3] *= 10
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_model_with_a_channel_that_stands_out_loses_less(tmp_path: Path, method: str) -> None:
    model = outlying(tmp_path / "model")
    wanted = logits(model)
    ways: dict[str, dict[str, Any]] = {"plain": {"transforms": []}, "done": {}}
    lost = [
        (logits(quantize(job(model), variant(method=method, bits=4, **keys), tmp_path / name).folder) - wanted).norm()
        for name, keys in ways.items()
    ]
    assert lost[1] < 0.8 * lost[0]


@pytest.mark.parametrize("inputs", ["float", "quantized"])
def test_methods_see_the_model_that_is_turned(tmp_path: Path, inputs: str) -> None:
    """Solved behind it is solved on a checkpoint that was turned before, of which the statistics are its own."""
    model = with_norms(make_model(tmp_path / "model", "llama"))
    originals, change = rotated(model)
    other = tmp_path / "other"
    other.mkdir()
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = {name: originals.parameter(name) for name, _ in originals.skeleton.model.named_parameters()}
    parts = {name: (name.rpartition(".")[0], name.rpartition(".")[2]) for name in tensors}
    turned = {name: change.apply(*parts[name], each).contiguous() for name, each in tensors.items()}
    save_file(turned, other / "model.safetensors", metadata={"format": "pt"})
    keys: dict[str, Any] = {"method": "awq+gptq", "alphas": 5, "symmetric": False}
    expected = quantize(job(other, inputs), variant(**keys, transforms=[]), tmp_path / "expected").folder
    found = quantize(job(model, inputs), variant(**keys), tmp_path / "found").folder
    for layer in read_json(found / "manifest.json")["layers"]:
        codes = [open_export(folder).weight(layer).codes for folder in (found, expected)]
        assert (codes[0] != codes[1]).float().mean() < 0.01, layer


def test_a_turned_variant_has_a_walk_of_its_own_with_float_inputs(tmp_path: Path) -> None:
    given = [variant(transforms=[]), variant(), variant(method="rtn"), variant(bits=3)]
    assert walks(job(tmp_path, "float"), given) == [[0, 2], [1, 3]]


def test_a_run_that_was_cut_short_gives_the_same_bytes(tmp_path: Path) -> None:
    model = with_norms(make_model(tmp_path / "model", "qwen2", tie_word_embeddings=True))
    spec = variant(method="gptq")
    whole = quantize(job(model), spec, tmp_path / "whole" / "out").folder
    with pytest.raises(KeyboardInterrupt):
        quantize(job(model), spec, tmp_path / "cut" / "out", on_segment=cut_after(1))
    done = quantize(job(model), spec, tmp_path / "cut" / "out")
    assert done.facts["resumed"] > 0
    assert file_sha256(whole / "model.safetensors") == file_sha256(done.folder / "model.safetensors")
