"""Who loads a checkpoint, and what each runtime says of itself."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.errors import CheckpointError, EvaluationError, RecipeError
from quantkit.formats import FORMATS
from quantkit.recipe import EvaluationSpec
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes._choice import choose_runtime
from quantkit.runtimes._model import TransformersModel
from quantkit.runtimes._packed import load_packed, packed_zero_points
from quantkit.runtimes.base import LoadOptions
from quantkit.system.validation import parse_section
from tests.runs import edit_json
from tests.tiny import make_model


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantkit.quantize(model, out=tmp_path_factory.mktemp("out") / "rtn", method="rtn", group_size=32)


@pytest.fixture
def checkpoint(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(exported, tmp_path / "checkpoint")


def chosen(path: Path, *wanted: str) -> str:
    return choose_runtime(path, *wanted).name


def test_auto_is_transformers_where_it_can_and_the_reference_decoder_elsewhere(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FORMATS.get("compressed-tensors")
    assert chosen(exported) == "transformers"
    monkeypatch.setattr(store, "requires", ("compressed-tensors", "a-package-that-is-not-there"))
    assert chosen(exported) == "reference"
    assert chosen(exported, "transformers") == "transformers"
    monkeypatch.undo()
    monkeypatch.setattr(store, "runtimes", ("transformers 4", "vllm"))
    assert chosen(exported) == "reference"
    monkeypatch.undo()
    monkeypatch.setattr(store, "computes_in", lambda schemes: ("float32",))
    assert chosen(exported) == "reference"
    assert choose_runtime(exported, "auto", "float32").name == "transformers"


@pytest.mark.parametrize("wanted", ["auto", "transformers", "reference"])
def test_a_float_model_is_loaded_by_transformers(model: Path, wanted: str) -> None:
    assert chosen(model, wanted) == "transformers"


def test_a_float_model_is_its_own_reference(model: Path) -> None:
    ids = torch.arange(5, 30)
    by = [RUNTIMES.get(name).load(model, LoadOptions(dtype="float32")) for name in ("transformers", "reference")]
    assert torch.equal(by[0].logits(ids), by[1].logits(ids))


@pytest.mark.parametrize("edit", [lambda manifest: manifest.pop("layers"), lambda manifest: manifest.pop("format")])
def test_what_quantkit_cannot_tell_is_left_to_transformers(
    checkpoint: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    def of_another_tool(config: dict[str, Any]) -> None:
        config["quantization_config"]["quant_method"] = "made-up"

    edit_json(checkpoint / "manifest.json", edit)
    edit_json(checkpoint / "config.json", of_another_tool)
    assert chosen(checkpoint) == "transformers"
    (checkpoint / "manifest.json").unlink()
    assert chosen(checkpoint) == "transformers"
    with pytest.raises(CheckpointError, match="quantized with 'made-up', which quantkit does not read"):
        choose_runtime(checkpoint, "reference").load(checkpoint, LoadOptions())


def test_a_format_that_is_not_installed_is_named(checkpoint: Path) -> None:
    edit_json(checkpoint / "manifest.json", lambda manifest: manifest.update(format="compressed-tensers"))
    assert chosen(checkpoint) == "transformers"
    with pytest.raises(RecipeError, match=r"unknown format 'compressed-tensers' \(did you mean 'compressed-tensors'"):
        RUNTIMES.get("reference").load(checkpoint, LoadOptions())


def test_a_gguf_file_goes_to_llama_cpp_where_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.gguf"):
        with monkeypatch.context() as patch:
            patch.setattr(RUNTIMES.get("llama.cpp"), "missing", lambda: None)
            assert chosen(path) == "llama.cpp"
            patch.setattr(RUNTIMES.get("llama.cpp"), "missing", lambda: "it is not installed")
            assert chosen(path) == "reference"
    with pytest.raises(EvaluationError, match=r"transformers does not compute from .*llama\.cpp, or with reference"):
        choose_runtime(tmp_path, "transformers").load(tmp_path, LoadOptions())


def test_names_are_looked_up_with_a_hint(exported: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown runtime 'transfromers' .did you mean 'transformers'"):
        choose_runtime(exported, "transfromers")
    with pytest.raises(RecipeError, match=r"loader: 'refrence' is not allowed .did you mean 'reference'"):
        parse_section(EvaluationSpec, {"loader": "refrence"}, "evaluation")
    for name in ("auto", "llama.cpp", "reference", "transformers", "vllm"):
        assert parse_section(EvaluationSpec, {"loader": name}, "evaluation").loader == name


def test_every_runtime_says_what_it_is() -> None:
    assert set(RUNTIMES.names()) >= {"llama.cpp", "reference", "transformers", "vllm"}
    for runtime in RUNTIMES:
        assert runtime.summary
        assert runtime.install.startswith("pip install") or runtime.separate
        assert set(runtime.formats()) <= {*FORMATS.names(), "float"}
        reason = runtime.missing()
        assert reason is None or "\n" not in reason
    assert [runtime.name for runtime in RUNTIMES if not runtime.packed] == ["reference"]
    assert [runtime.name for runtime in RUNTIMES if runtime.separate] == ["vllm"]


def test_a_loaded_model_says_what_it_computes_in(exported: Path) -> None:
    loaded = RUNTIMES.get("transformers").load(exported, LoadOptions(dtype="bfloat16"))
    assert isinstance(loaded, TransformersModel)
    assert (loaded.dtype, loaded.device, loaded.vocabulary) == (
        "bfloat16",
        "cpu",
        loaded.logits(torch.arange(3)).shape[1],
    )
    assert set(loaded.facts()) == {"transformers"}
    embedding = loaded.model.get_input_embeddings().weight
    assert loaded.weights_bytes() > embedding.nbytes


@pytest.mark.parametrize("path", ["nowhere", "file.bin", "file.gguf"])
def test_what_is_no_checkpoint_is_said(tmp_path: Path, path: str) -> None:
    (tmp_path / "file.bin").write_bytes(b"")
    with pytest.raises(EvaluationError, match=r"not a checkpoint|neither a folder nor a GGUF file"):
        choose_runtime(tmp_path / path)


def test_a_model_of_another_seed_has_other_logits(exported: Path, model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    ids = torch.arange(5, 30)
    load = RUNTIMES.get("transformers").load
    options = LoadOptions(dtype="float32")
    float_model, packed, unlike = (load(each, options).logits(ids) for each in (model, exported, other))
    assert (packed - float_model).norm() < 0.2 * float_model.norm() < (unlike - float_model).norm()


def test_packed_zero_points_are_mended_where_the_package_has_the_gap(model: Path, tmp_path: Path) -> None:
    """The stand-in is called; where it no longer is, loading says so instead of blaming the file."""
    keys: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32, "symmetric": False}
    folder = quantkit.quantize(model, out=tmp_path / "asymmetric", **keys)
    with packed_zero_points() as stand_in:
        assert stand_in.calls == 0
        load_packed(folder, LoadOptions(dtype="float32"))
    assert stand_in.calls > 0


def test_a_stand_in_that_is_not_called_is_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32}
    moved = "compressed_tensors.compressors.pack_quantized.base"
    folders = [
        quantkit.quantize(model, out=tmp_path / str(symmetric), symmetric=symmetric, **keys)
        for symmetric in (True, False)
    ]
    load_packed(folders[0], LoadOptions(dtype="float32"))
    monkeypatch.setitem(sys.modules, moved, None)
    load_packed(folders[0], LoadOptions(dtype="float32"))  # not needed
    with pytest.raises(EvaluationError, match="packed zero points wrongly, and not where quantkit mends it"):
        load_packed(folders[1], LoadOptions(dtype="float32"))
