"""Models as they lie on disk: heads that are said to be tied, leftovers, tensors too many, wrapped names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.checkpoint.wrapped_names import own_names, without_wrappers
from quantkit.engine.empty_model import empty_model
from quantkit.errors import CheckpointError
from quantkit.exports import find_gguf
from quantkit.gguf.head import read_head
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadOptions
from quantkit.source.view import loadable
from quantkit.system.artifacts import read_json, write_json
from quantkit.system.progress import Silent
from tests.adapters import make_adapter
from tests.tiny import make_model

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
IDS = torch.arange(5, 25)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Told(Silent):
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def changed(folder: Path, change: Change) -> Path:
    file = folder / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, {"format": "pt"})
    return folder


def renamed(folder: Path, rename: Callable[[str], str]) -> Path:
    return changed(folder, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})


def edited(folder: Path, **keys: Any) -> Path:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **keys})
    return folder


def logits(folder: Path) -> torch.Tensor:
    """As transformers computes them of what the checkpoint stands for."""
    runtime = RUNTIMES.get("reference")
    with loadable(folder, trust_remote_code=False, tell=lambda text: None) as seen:
        return runtime.load(seen, LoadOptions(dtype="float32")).logits(IDS)


def own_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {HEAD: tensors[EMBEDDING].flip(0) * 2}


def without_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def model(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


# Heads.


@pytest.mark.parametrize(
    "keys",
    [
        {"format": "compressed-tensors", "method": "rtn", "group_size": 32, "bits": 8},
        {"format": "compressed-tensors", "method": "rtn", "group_size": 32, "bits": 8, "ignore": []},
        {"format": "gptq", "method": "rtn", "group_size": 32, "bits": 8},
        {"format": "float", "method": "none", "scheme": "float16"},
        {"format": "gguf", "method": "none", "scheme": "float16"},
        {"format": "gguf", "method": "rtn", "scheme": "q8_0"},
    ],
)
def test_a_head_of_its_own_is_kept_whatever_the_config_says(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = changed(make_model(tmp_path / "model", tie_word_embeddings=True), own_head)
    told, expected = Told(), logits(edited(Path(shutil.copytree(model, tmp_path / "x")), tie_word_embeddings=False))
    out = quantkit.quantize(model, out=tmp_path / "out", observer=told, **keys)
    assert any("share one weight, and they differ: each is kept" in note for note in told.notes)
    found = logits(out)
    assert (found - expected).norm() < 0.1 * expected.norm()
    file = find_gguf(out)
    if file is None:
        assert read_json(out / "config.json")["tie_word_embeddings"] is False
    else:
        assert "output.weight" in read_head(file).tensors
        assert read_head(file).metadata["general.name"] == "model"


def test_a_head_that_is_the_embedding_twice_stays_tied(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    changed(model, lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()})
    told = Told()
    out = quantkit.quantize(model, out=tmp_path / "out", method="rtn", group_size=32, observer=told)
    assert not any("share one weight" in note for note in told.notes)
    assert read_json(out / "config.json")["tie_word_embeddings"] is True


def test_a_head_that_is_missing_is_the_embedding_and_that_is_told(model: Path, tmp_path: Path) -> None:
    changed(model, without_head)
    expected = logits(edited(Path(shutil.copytree(model, tmp_path / "x")), tie_word_embeddings=True))
    told = Told()
    out = quantkit.quantize(model, out=tmp_path / "out", method="rtn", bits=8, group_size=32, observer=told)
    assert any("there is none: it is the embedding's" in note for note in told.notes)
    assert read_json(out / "config.json")["tie_word_embeddings"] is True
    assert (logits(out) - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(logits(model), expected)


def test_a_merge_keeps_a_head_of_its_own(tmp_path: Path) -> None:
    model = changed(make_model(tmp_path / "base", tie_word_embeddings=True), own_head)
    adapter = make_adapter(tmp_path / "adapter", model)
    told = Told()
    quantkit.merge(model, adapter, out=tmp_path / "merged", any_base=True, observer=told)
    merged, base = CheckpointReader(tmp_path / "merged"), CheckpointReader(model)
    assert torch.equal(merged.read(HEAD), base.read(HEAD))
    assert read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is False


def test_converting_keeps_a_head_of_its_own(tmp_path: Path) -> None:
    model = changed(make_model(tmp_path / "model", tie_word_embeddings=True), own_head)
    out = quantkit.quantize(model, out=tmp_path / "out", method="rtn", group_size=32, scheme="int", symmetric=True)
    edited(out, tie_word_embeddings=True)
    (out / "manifest.json").unlink()
    expected = logits(out)
    found = quantkit.convert(out, "gguf", out=tmp_path / "gguf")
    assert any("share one weight, and they differ" in note for note in found["notes"])
    assert (logits(tmp_path / "gguf") - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".lora_A.", ".lora_A.sft.").replace(".lora_B.", ".lora_B.sft."),
        lambda name: f"_fsdp_wrapped_module.{name.replace('layers.0.', 'layers.0._checkpoint_wrapped_module.')}",
        lambda name: f"module.{name}",
    ],
)
def test_an_adapter_with_wrapped_names_merges_as_without(
    model: Path, tmp_path: Path, rename: Callable[[str], str]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", model)
    quantkit.merge(model, adapter, out=tmp_path / "expected")
    file = adapter / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    quantkit.merge(model, adapter, out=tmp_path / "found")
    found, expected = (CheckpointReader(tmp_path / name) for name in ("found", "expected"))
    assert all(torch.equal(found.read(name), expected.read(name)) for name in expected.names())


# Leftovers.


def adapter_beside(folder: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4, "target_modules": ["q_proj"]}
    write_json(folder / "adapter_config.json", config)
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(4, 64)}, folder / "adapter_model.safetensors")


def stale_bitsandbytes(folder: Path) -> None:
    edited(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def stale_compressed(folder: Path) -> None:
    edited(folder, quantization_config={"quant_method": "compressed-tensors", "config_groups": {}})


def stale_index(folder: Path) -> None:
    write_json(folder / "model.safetensors.index.json", {"weight_map": {HEAD: "model-00001-of-00002.safetensors"}})


def pickles(folder: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "consolidated.00.pth"):
        (folder / name).write_bytes(b"x")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")


def older_single(folder: Path) -> None:
    """Shards of the model beside an older single file of something else."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    names = list(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
    placed = {name: shard for shard, part in halves.items() for name in part}
    write_json(folder / "model.safetensors.index.json", {"weight_map": placed})
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, {"format": "pt"})
    os.utime(file, (1e9, 1e9))


LEFTOVERS: dict[Callable[[Path], None], str] = {
    adapter_beside: "adapter_config.json (for org/base) lies beside a whole model",
    stale_bitsandbytes: "the weights are quantized (bitsandbytes), and they are floats",
    stale_compressed: "the weights are quantized (compressed-tensors), and they are floats",
    stale_index: "model.safetensors.index.json is a leftover beside model.safetensors",
    pickles: "not read, as model.safetensors is: consolidated.safetensors",
    older_single: "model.safetensors is a leftover beside model.safetensors.index.json",
}


@pytest.mark.parametrize("leave", list(LEFTOVERS))
def test_leftovers_are_told_and_the_weights_are_taken(
    plain: Path, model: Path, tmp_path: Path, leave: Callable[[Path], None]
) -> None:
    leave(model)
    assert torch.equal(logits(model), logits(plain))
    found = quantkit.inspect(model)
    assert found["kind"] == "float"
    assert any(LEFTOVERS[leave] in problem for problem in found["problems"])
    told = Told()
    out = quantkit.quantize(model, out=tmp_path / "out", method="rtn", bits=8, group_size=32, observer=told)
    assert any(LEFTOVERS[leave] in note for note in told.notes)
    names = {file.name for file in out.iterdir()}
    assert not names & {"adapter_config.json", "adapter_model.safetensors", "training_args.bin", "pytorch_model.bin"}
    assert not names & {"consolidated.safetensors", "model.safetensors.index.json"}
    assert read_json(out / "config.json")["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (logits(out) - logits(plain)).norm() < 0.1 * logits(plain).norm()


def test_two_checkpoints_of_one_time_that_differ_are_refused_and_equal_ones_are_one(model: Path) -> None:
    wanted = CheckpointReader(model).read(HEAD)
    shutil.copy(model / "model.safetensors", model / "kept")
    older_single(model)
    os.utime(model / "model.safetensors")
    with pytest.raises(CheckpointError, match="two checkpoints that differ"):
        CheckpointReader(model)
    shutil.copy(model / "kept", model / "model.safetensors")
    assert CheckpointReader(model).index is None
    (model / "model-00001-of-00002.safetensors").unlink()
    assert torch.equal(CheckpointReader(model).read(HEAD), wanted)


def test_a_quantized_checkpoint_with_an_adapter_beside_it_loads(model: Path, tmp_path: Path) -> None:
    out = quantkit.quantize(model, out=tmp_path / "out", method="rtn", group_size=32)
    expected = logits(out)
    adapter_beside(out)
    assert any("lies beside a whole model" in problem for problem in quantkit.inspect(out)["problems"])
    assert torch.equal(logits(out), expected)


# Tensors too many.

EXTRA = {
    "model.rotary_emb.inv_freq": (8,),
    "model.layers.0.self_attn.rotary_emb.inv_freq": (8,),
    "v_head.summary.weight": (1, 64),
    "v_head.summary.bias": (1,),
    "mtp.fc.weight": (64, 128),
    "model.layers.2.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.q_proj.bias": (64,),
    "model.extra": (3,),
    "step": (1,),
}
AWAY = ("rotary_emb", "v_head")


def test_tensors_that_the_class_does_not_know_stop_no_stage(plain: Path, model: Path, tmp_path: Path) -> None:
    changed(model, lambda tensors: tensors | {name: torch.ones(shape) for name, shape in EXTRA.items()})
    assert torch.equal(logits(model), logits(plain))
    problems = " ".join(quantkit.inspect(model)["problems"])
    assert "tensors that the model does not know" in problems
    assert "served training alone" in problems
    told = Told()
    out = quantkit.quantize(model, out=tmp_path / "out", method="rtn", bits=8, group_size=32, observer=told)
    text = " ".join(told.notes)
    assert "left out, as they follow from the config or served training alone" in text
    assert "unknown to LlamaForCausalLM, copied as they are" in text
    kept = set(CheckpointReader(out).names())
    assert {name for name in EXTRA if not any(part in name for part in AWAY)} <= kept
    assert not any(part in name for name in kept for part in AWAY)
    assert (logits(out) - logits(plain)).norm() < 0.1 * logits(plain).norm()
    told = Told()
    keys: dict[str, Any] = {"method": "none", "scheme": "float16", "format": "gguf", "observer": told}
    file = quantkit.quantize(model, out=tmp_path / "gguf", **keys)
    assert "unknown to LlamaForCausalLM, left out" in " ".join(told.notes)
    assert (logits(file) - logits(plain)).norm() < 0.01 * logits(plain).norm()
    quantkit.convert(out, "gptq", out=tmp_path / "converted")
    assert "mtp.fc.weight" in CheckpointReader(tmp_path / "converted")


# Wrapped names.


def in_the_middle(name: str) -> str:
    inside = name.replace("layers.0.", "layers.0._checkpoint_wrapped_module.").replace("mlp.", "mlp._orig_mod.")
    return f"_fsdp_wrapped_module.{inside}"


WRAPPED: dict[str, Callable[[str], str]] = {
    "fsdp": lambda name: f"_fsdp_wrapped_module.{name}",
    "middle": in_the_middle,
    "several": lambda name: f"module._orig_mod.{name}",
    "forward": lambda name: f"_forward_module.{name}",
    "peft": lambda name: f"base_model.model.{name}",
    "named": lambda name: f"net.student.{name}",
    "body": lambda name: f"student.{name.removeprefix('model.')}",
    "none": lambda name: name.removeprefix("model."),
    "some": lambda name: f"module.{name}" if "layers" in name else name,
}


@pytest.mark.parametrize("kind", list(WRAPPED))
def test_wrapped_names_are_taken_apart(plain: Path, model: Path, tmp_path: Path, kind: str) -> None:
    renamed(model, WRAPPED[kind])
    assert torch.equal(logits(model), logits(plain))
    told = Told()
    out = quantkit.quantize(model, out=tmp_path / "out", method="rtn", group_size=32, observer=told)
    prefix = "" if kind in ("none", "body") else "model."
    assert f"{prefix}layers.0.mlp.up_proj.weight_packed" in CheckpointReader(out)
    assert any("tensors have other names" in note for note in told.notes) or kind == "none"


def test_names_of_experts_are_taken_apart(tmp_path: Path) -> None:
    from tests.architectures import make

    make(tmp_path / "m", "mixtral")
    reader = CheckpointReader(tmp_path / "m")
    shapes = {f"module.{name}": reader.shape(name) for name in reader.names()}
    found = own_names(empty_model(tmp_path / "m"), shapes)
    assert found == {name: name.removeprefix("module.") for name in shapes}
    assert own_names(empty_model(tmp_path / "m"), {own: shapes[name] for name, own in found.items()}) == {}
    assert without_wrappers("module.a._orig_mod.module_list.b") == "a.module_list.b"


def test_two_tensors_of_one_name_are_refused(model: Path) -> None:
    changed(model, lambda tensors: tensors | {f"_orig_mod.{HEAD}": tensors[HEAD].clone()})
    reader = CheckpointReader(model)
    with pytest.raises(CheckpointError, match=r"which are both 'lm_head\.weight'"):
        own_names(empty_model(model), {name: reader.shape(name) for name in reader.names()})


# Numbers that JSON has no word for.


def test_infinite_numbers_of_a_config_stop_nothing(model: Path, tmp_path: Path) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**read_json(file), "time_step_limit": [0.0, float("inf")], "odd": float("nan")}))
    write_json(model / "generation_config.json", {"max_time": float("inf")})
    assert quantkit.inspect(model)["problems"] == []
    out = quantkit.quantize(model, out=tmp_path / "out", method="rtn", group_size=32)
    assert read_json(out / "config.json")["time_step_limit"] == [0.0, float("inf")]
    assert json.dumps(quantkit.inspect(out), allow_nan=False)
