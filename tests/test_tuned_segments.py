"""What tuning made of a segment: it is stored, told, and put back by a run that goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint import CheckpointReader
from quantkit.engine import solver as solving
from quantkit.engine.segment import Segment
from quantkit.engine.tasks import Tuned, VariantTask
from quantkit.quantization import Job, Quantized, quantize
from quantkit.quantization import walk_variants as walking
from quantkit.quantization.solved_layers import SolvedLayers
from quantkit.quantization.solving_notes import tuning_notes
from quantkit.recipe import VariantSpec
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes.base import LoadOptions
from quantkit.system.artifacts import file_sha256
from tests.tiny import make_model, tiny_rows

BLOCKS = 3
NORM, BIAS = "input_layernorm.weight", "self_attn.q_proj.bias"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "qwen2", num_hidden_layers=BLOCKS)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of tuning: scales of a block's last layer and two float parameters of the block are changed."""

    def tuned(task: VariantTask, segment: Segment, *_: Any) -> Tuned:
        last = next(layer for layer in segment.layers if "down_proj" in layer.name)
        return change(task, segment, last)

    monkeypatch.setattr(solving, "tuned_segment", tuned)
    monkeypatch.setattr(walking, "choose_strategy", lambda *_: "recompute")


def change(task: VariantTask, segment: Segment, layer: Any) -> Tuned:
    if segment.prefix.endswith("1"):
        return Tuned(0.5, 0.5, 1)
    taken = task.sink._waiting  # type: ignore[attr-defined]
    packed = {name.removeprefix(f"{layer.name}."): each for name, each in taken.items() if name.startswith(layer.name)}
    stored = task.sink._store.unpack(packed, task.schemes[layer.name])  # type: ignore[attr-defined]
    weight = replace(stored, scales=(stored.scales * 1.25).to(stored.scales.dtype))
    layer.put(weight.dequantize(torch.float32))
    floats = {}
    for name in (NORM, BIAS):
        parameter = segment.module.get_parameter(name)
        parameter.data = parameter.data * 1.5
        floats[f"{segment.prefix}.{name}"] = parameter.data.clone()
    return Tuned(0.5, 0.25, 7, {layer.name: weight}, floats, "ended early" if segment.prefix.endswith("2") else "")


def run(model: Path, out: Path, *, stop: int = 0, **keys: Any) -> Quantized:
    def on_segment(done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    job = Job(model, {"reference": "tiny"}, "float32", rows=tiny_rows(), calibration_sha256="0" * 64, device="cpu")
    quick = {"search": 1, "refinements": 0, "correction": False} if "gptq" in keys["method"] else {}
    sized = {} if "scheme" in keys else {"group_size": 32}
    variant = VariantSpec.model_validate({"name": "v", **quick, **sized, **keys})
    return quantize(job, variant, out, on_segment=on_segment)


@pytest.mark.usefixtures("stub")
def test_a_run_that_goes_on_has_what_tuning_made_before(model: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"method": "awq+gptq+tune", "alphas": 2}
    whole = run(model, tmp_path / "whole", **keys)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "cut", stop=2, **keys)
    done = run(model, tmp_path / "cut", **keys)
    assert done.facts["resumed"] == 2
    files = {path.name: file_sha256(path) for path in whole.folder.iterdir() if path.name != "stage.json"}
    assert files == {name: file_sha256(done.folder / name) for name in files}
    assert done.facts["tuning"] == whole.facts["tuning"]
    assert done.facts["bits_per_weight"] == whole.facts["bits_per_weight"]


@pytest.mark.usefixtures("stub")
def test_what_tuning_changed_is_in_the_checkpoint_and_told(model: Path, tmp_path: Path) -> None:
    done = run(model, tmp_path / "out", method="gptq+tune")
    before, after = CheckpointReader(model), CheckpointReader(done.folder)
    for block, factor in ((0, 1.5), (1, 1.0), (2, 1.5)):
        for name in (NORM, BIAS):
            tensor = f"model.layers.{block}.{name}"
            wanted = before.read(tensor) * factor
            torch.testing.assert_close(after.read(tensor), wanted, rtol=2**-7, atol=0)  # passes may be in bfloat16
    assert [(each["segment"], each["paid"], each["steps"]) for each in done.facts["tuning"]] == [
        ("model.layers.0", True, 7),
        ("model.layers.1", False, 1),
        ("model.layers.2", True, 7),
    ]
    told = [note for note in done.facts["notes"] if note.startswith("tune: ")]
    assert told == [
        "tune: 2 of 3 blocks are closer to the float model's: the error of held-out rows fell to 0.50 of what it was, "
        "in 7 steps on average; it did not pay in model.layers.1, which the method alone made",
        "tune: model.layers.2: ended early",
    ]


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize(
    "keys",
    [
        {"format": "gptq"},
        {"format": "hqq", "symmetric": False, "zeros": "float"},
        {"format": "bitsandbytes", "scheme": "nf4", "double_quant": False},
        {"format": "gguf"},
    ],
    ids=lambda keys: str(keys["format"]),
)
def test_every_format_stores_floats_that_tuning_changed(model: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    made, tuned = dict[str, torch.Tensor](), SolvedLayers.tuned

    def seen(self: SolvedLayers, prefix: str, done: Tuned) -> None:
        made.update(done.floats)
        tuned(self, prefix, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SolvedLayers, "tuned", seen)
        done = run(model, tmp_path / "out", method="rtn+tune", **keys)
    loaded: Any = RUNTIMES.get("reference").load(done.folder, LoadOptions(device="cpu", dtype="float32"))
    assert len(made) == 4
    for name, value in made.items():
        assert torch.equal(loaded.model.get_parameter(name), value), name


def test_nothing_is_told_of_what_is_not_tuned() -> None:
    assert tuning_notes([]) == []
