"""Adapters as trainers and people leave them: saved in part, by raw names, beside a base of another folder's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import QuantkitError
from quantkit.merging.base import tail
from quantkit.recipe import ModelSpec
from quantkit.source import resolve
from tests.adapters import make_adapter
from tests.tiny import make_model

Tensors = dict[str, torch.Tensor]
HEAD = "base_model.model.lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bases") / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose head was trained whole."""
    folder = tmp_path_factory.mktemp("adapters") / "whole"
    return make_adapter(folder, base, target_modules=["q_proj"], modules_to_save=["lm_head"])


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> CheckpointReader:
    found = quantkit.merge(base, adapter, out=tmp_path_factory.mktemp("merged") / "out")
    return CheckpointReader(Path(found["folder"]))


def changed(adapter: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of the adapter with other tensors."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(file)).items()}, file)
    return folder


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        renamed(lambda name: name.replace("lm_head.", "lm_head.modules_to_save.default.")),
        renamed(lambda name: name.replace("lm_head.", "lm_head.modules_to_save.")),
        renamed(lambda name: name.removeprefix("base_model.model.")),
        lambda tensors: {
            **renamed(lambda name: name.replace("lm_head.", "lm_head.modules_to_save.default."))(tensors),
            "base_model.model.lm_head.original_module.weight": torch.zeros_like(tensors[HEAD]),
        },
    ],
    ids=["a state dict's names", "without the adapter's name", "the base's own names", "with the original"],
)
def test_what_was_trained_whole_is_found_under_raw_names(
    base: Path, adapter: Path, merged: CheckpointReader, tmp_path: Path, change: Callable[[Tensors], Tensors]
) -> None:
    found = quantkit.merge(base, changed(adapter, tmp_path / "raw", change), out=tmp_path / "out")
    assert "skipped" not in found["check"], found["check"]
    written = CheckpointReader(tmp_path / "out")
    assert all(torch.equal(written.read(name), merged.read(name)) for name in merged.names())


def test_what_was_trained_whole_and_is_not_there_is_told(base: Path, adapter: Path, tmp_path: Path) -> None:
    lost = changed(adapter, tmp_path / "lost", lambda tensors: {k: v for k, v in tensors.items() if k != HEAD})
    expected = r"its modules_to_save \(lm_head\) were trained whole, and it holds no tensor for 'lm_head.weight'"
    with pytest.raises(QuantkitError, match=expected):
        quantkit.merge(base, lost, out=tmp_path / "out")


def test_modules_that_the_base_does_not_have_are_nobodys(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head", "score"]}))
    quantkit.merge(base, other, out=tmp_path / "out")


def test_tensors_that_were_not_gathered_say_how_to(base: Path, adapter: Path, tmp_path: Path) -> None:
    def emptied(tensors: Tensors) -> Tensors:
        return {name: torch.zeros(0) if "lora_B" in name else tensor for name, tensor in tensors.items()}

    empty = changed(adapter, tmp_path / "empty", emptied)
    with pytest.raises(QuantkitError, match=r"ZeRO-3 without gathering .*zero_to_fp32\.py.*stage3_gather_16bit"):
        quantkit.merge(base, empty, out=tmp_path / "out")


def test_an_error_of_peft_of_any_kind_is_a_note(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **keys: object) -> None:
        raise AssertionError("no such module\nand more")

    monkeypatch.setattr("peft.PeftModel.from_pretrained", fail)
    found = quantkit.merge(base, adapter, out=tmp_path / "out")
    assert found["check"]["skipped"] == "PEFT cannot run the adapter: no such module"


def test_what_goes_along_with_the_base_goes_along_with_the_merge(base: Path, adapter: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(base, tmp_path / "seeing")
    files = {
        "preprocessor_config.json": "{}",
        "processor_config.json": "{}",
        "additional_chat_templates/tool_use.jinja": "{{ 1 }}",
        "LICENSE.txt": "free",
        "NOTICE": "ours",
    }
    for name, text in files.items():
        (whole / name).parent.mkdir(exist_ok=True)
        (whole / name).write_text(text)
    quantkit.merge(whole, adapter, out=tmp_path / "out", any_base=True)
    assert {name: (tmp_path / "out" / name).read_text() for name in files} == files


@pytest.mark.parametrize(
    "place",
    [
        "Qwen/Qwen2.5-0.5B-Instruct",
        "qwen2.5-0.5b-instruct",
        "./models/Qwen2.5-0.5B-Instruct/",
        "/root/.cache/modelscope/hub/models/Qwen/Qwen2___5-0___5B-Instruct",
        "/root/.cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B-Instruct/snapshots/0123abc",
        "/data/models--Qwen--Qwen2.5-0.5B-Instruct",
        "/root/.cache/modelscope/hub/models/Qwen--Qwen2.5-0.5B-Instruct/snapshots/master/",
        r"C:\models\Qwen2.5-0.5B-Instruct",
        "Qwen/Qwen2.5-0.5B-Instruct@main",
    ],
)
def test_a_base_is_the_same_model_wherever_it_lies(place: str) -> None:
    assert tail(place) == "qwen2.5-0.5b-instruct"


def test_other_models_are_others() -> None:
    names = ["Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B", "Qwen2-0.5B-Instruct", "models--gpt2/snapshots/0a", "gpt2-xl"]
    assert len({tail(name) for name in names}) == len(names)


def test_an_adapter_where_a_model_is_wanted_says_merge(base: Path, adapter: Path, tmp_path: Path) -> None:
    training = tmp_path / "training"
    for step in (50, 100):
        shutil.copytree(adapter, training / f"checkpoint-{step}")
    for folder, last in ((adapter, adapter), (training, training / "checkpoint-100")):
        expected = rf"LoRA.*quantkit merge .*base {last} OUT"
        for command in (
            lambda place: resolve(ModelSpec(source=str(place)), tmp_path / "work"),
            quantkit.inspect,
            quantkit.evaluate,
        ):
            with pytest.raises(QuantkitError, match=expected):
                command(folder)
    with pytest.raises(QuantkitError, match=r"give one of its checkpoints, such as .*checkpoint-100"):
        quantkit.merge(base, training, out=tmp_path / "out")
    with pytest.raises(QuantkitError, match="is a whole model and no adapter"):
        quantkit.merge(base, base, out=tmp_path / "out")
