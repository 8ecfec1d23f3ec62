"""A model of wider floats than servers take: 16 bits by default, which of the two by its values, and told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.exports.manifest import read_manifest
from quantkit.merging import merged_source
from quantkit.recipe import MergeSpec, ModelSpec
from quantkit.source import resolve
from quantkit.source.halving import halved
from quantkit.system.artifacts import read_json
from tests.adapters import make_adapter
from tests.runs import Notebook
from tests.tiny import make_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("tensors", "dtype", "why"),
    [
        ([torch.tensor([1.0, 2.0**100, 2.0**-15])], "bfloat16", "every value"),
        ([torch.tensor([1.0009765625])], "float16", "every value"),
        ([torch.tensor([1.5]), torch.tensor([1.0009765625]), torch.tensor([70000.0])], "bfloat16", "significant bits"),
        ([torch.tensor([0.1])], "bfloat16", "significant bits"),
        ([torch.tensor([1 << 40]), torch.tensor([2.0])], "bfloat16", "every value"),
        ([torch.tensor([torch.nan])], "bfloat16", "significant bits"),
    ],
)
def test_the_dtype_is_the_one_that_holds_the_values(tensors: list[torch.Tensor], dtype: str, why: str) -> None:
    found = halved(tensors)
    assert found.dtype == dtype
    assert why in found.why


@pytest.mark.parametrize("was", [torch.float32, torch.float64])
def test_scales_and_floats_of_a_wide_model_have_16_bits(tmp_path: Path, was: torch.dtype) -> None:
    model = make_model(tmp_path / "model", dtype=was)
    notebook = Notebook()
    out = quantkit.quantize(model, out=tmp_path / "out", method="rtn", observer=notebook)
    reader = CheckpointReader(out)
    assert {reader.dtype(name) for name in reader.names()} & {torch.float32, torch.float64} == set()
    assert reader.dtype("model.layers.0.mlp.up_proj.weight_scale") == torch.bfloat16
    assert read_json(out / "config.json")["dtype"] == "bfloat16"
    manifest = read_manifest(out)
    assert manifest is not None
    assert 4.25 <= manifest["bits_per_weight"] < 4.3  # scales in 32 bits take 4.5
    name = str(was).removeprefix("torch.")
    assert any(f"is {name} and is taken in bfloat16" in note and "dtype: own" in note for note in notebook.notes)
    told = quantkit.estimate(model, method="rtn")
    assert told.part("file").nbytes == sum(map(reader.nbytes, reader.names()))


def test_a_model_stored_wider_than_it_was_gets_its_dtype_back(tmp_path: Path) -> None:
    model = make_model(tmp_path / "half", dtype=torch.float16)
    wide = tmp_path / "wide"
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(wide)
    tiny_tokenizer().save_pretrained(wide)
    notebook = Notebook()
    found = merged_source(ModelSpec(source=str(wide)), MergeSpec(), tmp_path / "work", notebook)
    assert found.dtype == "float16"
    assert "holds every value of it exactly" in found.note
    assert notebook.notes == [found.note]
    reader = CheckpointReader(found.folder)
    assert all(torch.equal(reader.read(name), CheckpointReader(model).read(name)) for name in reader.names())
    again = merged_source(ModelSpec(source=str(wide)), MergeSpec(), tmp_path / "work", Notebook())
    assert again == found


def test_own_keeps_float32(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    out = quantkit.quantize(model, out=tmp_path / "out", method="rtn", dtype="own")
    assert CheckpointReader(out).dtype("model.layers.0.mlp.up_proj.weight_scale") == torch.float32


def test_a_merge_into_a_wide_base_is_rounded_once(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    spec = {"source": str(base), "adapter": str(adapter)}
    notebook = Notebook()
    half = merged_source(ModelSpec.model_validate(spec), MergeSpec(), tmp_path / "half", notebook)
    full = merged_source(ModelSpec.model_validate({**spec, "dtype": "own"}), MergeSpec(), tmp_path / "full", Notebook())
    assert (half.dtype, full.dtype) == ("bfloat16", "float32")
    assert half.note in notebook.notes
    for name in CheckpointReader(full.folder).names():
        whole = CheckpointReader(full.folder).read(name)
        assert torch.equal(CheckpointReader(half.folder).read(name), whole.bfloat16())


def test_values_that_a_dtype_makes_zeros_are_told(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype=torch.bfloat16)
    name, file = "model.layers.0.mlp.up_proj.weight", model / "model.safetensors"
    tensors = load_file(file)
    tensors[name][0] *= 1e-8
    save_file(tensors, file, {"format": "pt"})
    for work in ("first", "first"):  # told again where the copy lies there already
        source = resolve(ModelSpec(source=str(model), dtype="float16"), tmp_path / work)
        (line,) = source.notes
        row = tensors[name].shape[1]
        assert line.startswith(f"{row} values of 1 tensor are too small for float16 and became 0, 0.0078 of those of")
        assert name in line
    notebook = Notebook()
    quantkit.quantize(model, out=tmp_path / "out", method="rtn", dtype="float16", observer=notebook)
    assert any("too small for float16" in note for note in notebook.notes)
    save_file({**tensors, name: tensors[name].clone()[:].fill_(0.5)}, file, {"format": "pt"})
    assert resolve(ModelSpec(source=str(model), dtype="float16"), tmp_path / "second").notes == ()
