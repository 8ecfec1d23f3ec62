"""The reference decoder: checkpoints of any format as float models, by the code of the format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint import CheckpointReader
from quantkit.errors import CheckpointError, EvaluationError, QuantkitError
from quantkit.evaluation import EvaluationJob
from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.stage import report_figures
from quantkit.exports import open_export
from quantkit.formats import FORMATS
from quantkit.recipe import EvaluationSpec, TextSpec, VariantSpec
from quantkit.report.columns import DECODED_MARK, build_columns
from quantkit.report.definitions import definitions
from quantkit.report.facts import variant_facts
from quantkit.runtimes import RUNTIMES
from quantkit.runtimes._decoded import decoded_state
from quantkit.runtimes.base import LoadOptions
from quantkit.schemes import IntScheme
from quantkit.system.validation import parse_section
from tests.runs import decoded_model, edit_json, load_model, logits
from tests.tiny import make_model

KEYS: dict[str, Any] = {"method": "rtn", "group_size": 32, "overrides": {"down_proj": {"bits": 8, "symmetric": False}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama", dtype=torch.float16)


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantkit.quantize(model, out=tmp_path_factory.mktemp("out") / "rtn", **KEYS)


@pytest.fixture
def checkpoint(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(exported, tmp_path / "checkpoint")


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, dtype: str = "float32") -> Any:
    return load_model(folder, "reference", dtype)


def test_the_decoded_model_is_the_one_that_the_format_stands_for(model: Path, exported: Path) -> None:
    found = load(exported)
    wanted = decoded_model(model, exported, parse_section(VariantSpec, {"name": "v", **KEYS}, "test"))
    state = wanted.state_dict()
    assert set(found.state_dict()) == set(state)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(logits(found), logits(wanted))
    assert not found.training
    assert found.config.to_dict().get("quantization_config") is None


def test_the_decoded_model_computes_what_transformers_does(exported: Path) -> None:
    native = load_model(exported, "transformers")
    torch.testing.assert_close(logits(load(exported)), logits(native), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", [{"scheme": "fp8"}, {"bits": 8, "group_size": -1}, {"scheme": "mxfp4"}])
def test_other_schemes_are_decoded_too(model: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    folder = quantkit.quantize(model, out=tmp_path / "out", method="rtn", **keys)
    wanted = decoded_model(model, folder, parse_section(VariantSpec, {"name": "v", "method": "rtn", **keys}, "test"))
    torch.testing.assert_close(logits(load(folder)), logits(wanted), rtol=0, atol=0)


def test_a_tied_head_that_was_quantized_is_decoded_apart_from_the_embedding(tmp_path: Path) -> None:
    source = make_model(tmp_path / "tied", tie_word_embeddings=True)
    folder = quantkit.quantize(source, out=tmp_path / "out", method="rtn", group_size=32, ignore=[], dtype="own")
    found = load(folder)
    embedding = found.get_input_embeddings().weight
    assert torch.equal(embedding, load_file(source / "model.safetensors")["model.embed_tokens.weight"])
    assert 0 < (found.lm_head.weight - embedding).abs().max() < 0.1


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_all_of_the_model_has_the_dtype_that_is_asked_for(exported: Path, dtype: str, expected: torch.dtype) -> None:
    assert {parameter.dtype for parameter in load(exported, dtype=dtype).parameters()} == {expected}


def test_no_tensor_is_read_before_it_is_asked_for(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = CheckpointReader.read

    def reading(self: Any, name: str) -> torch.Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(CheckpointReader, "read", reading)
    state = decoded_state(open_export(exported), torch.float32)
    assert read == []
    layer = "model.layers.0.mlp.up_proj"
    assert state[f"{layer}.weight"][...].shape == (128, 64)
    assert read == [f"{layer}.{suffix}" for suffix in FORMATS.get("compressed-tensors")().layer_suffixes(IntScheme())]
    assert not any("packed" in name for name in state)


# Broken files


def test_a_packed_tensor_that_is_missing_is_named(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_scale"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale"):
        load(checkpoint)


def test_every_tensor_must_find_its_place(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(EvaluationError, match=r"1 are missing: model\.norm\.weight"):
        load(checkpoint)
    edit_tensors(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(EvaluationError, match=r"1 have the wrong shape: model\.norm\.weight"):
        load(checkpoint)
    edit_tensors(checkpoint, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64), "x": torch.ones(2)}))
    load(checkpoint)  # what no packed layer is made of is no part of the model


def test_a_layer_that_the_manifest_forgets_is_not_passed_over(checkpoint: Path) -> None:
    edit_json(checkpoint / "manifest.json", lambda manifest: manifest["layers"].pop("model.layers.0.mlp.up_proj"))
    with pytest.raises(EvaluationError, match=r"1 are missing: model\.layers\.0\.mlp\.up_proj\.weight; 2 are not kno"):
        load(checkpoint)


@pytest.mark.parametrize(
    "text",
    ['{"format": "compressed-tensors", "layers": {"a": {"kind": "int9"}}}', "{", '{"format": "x", "layers": {"a": 3}}'],
)
def test_a_broken_manifest_is_one_clear_error(checkpoint: Path, text: str) -> None:
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(QuantkitError) as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_cannot_be_decoded_fails_the_whole(checkpoint: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight_packed"
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: tensors[name][:5].contiguous()}))
    with pytest.raises(CheckpointError, match=r"layer model\.layers\.1\.mlp\.up_proj of .*: weight_shape"):
        load(checkpoint)


# Figures


@pytest.fixture
def spec(tmp_path: Path) -> EvaluationSpec:
    file = tmp_path / "text.txt"
    file.write_text("The tide went out further than anyone had seen. " * 9, encoding="utf-8")
    texts = (TextSpec(name="tide", file=str(file)),)
    metrics = ("perplexity", "memory")
    return EvaluationSpec(texts=texts, context_length=64, max_tokens=200, device="cpu", metrics=metrics)


def test_an_evaluation_says_who_loaded_and_gives_the_same_figures(exported: Path, spec: EvaluationSpec) -> None:
    by = {
        loader: evaluate(EvaluationJob(exported, spec.model_copy(update={"loader": loader})), lambda *_: None)
        for loader in ("auto", "reference")
    }
    assert (by["auto"]["loaded_by"], by["reference"]["loaded_by"]) == ("transformers", "reference")
    assert by["reference"]["metrics"]["perplexity"]["tide"] == pytest.approx(
        by["auto"]["metrics"]["perplexity"]["tide"], rel=1e-5
    )
    memory = by["reference"]["memory"]
    assert (
        memory["weights_bytes"]
        == RUNTIMES.get("reference").load(exported, LoadOptions(dtype="float32")).weights_bytes()
    )
    assert memory["weights_bytes"] > by["auto"]["memory"]["weights_bytes"]
    assert memory["weights_are"] == "decoded to float"
    assert by["auto"]["memory"]["weights_are"] == "as loaded by transformers"


def test_the_report_marks_what_was_decoded(exported: Path, spec: EvaluationSpec) -> None:
    job = EvaluationJob(exported, spec.model_copy(update={"loader": "reference"}))
    figures = report_figures(evaluate(job, lambda *_: None))
    row = {"name": "a", "status": "ok", "scheme": "int4 g32 sym", **figures}
    native = {**row, "name": "b", "loaded_by": "transformers"}
    report = {"name": "run", "baseline": {"memory": figures["memory"]}, "variants": [row, native]}
    shown = [cell.text.endswith(f" {DECODED_MARK}") for cell in build_columns(report)["weights"].cells]
    assert shown == [False, True, False]
    assert f"{DECODED_MARK} The reference decoder loaded" in dict(definitions(report))["Weights memory"]
    assert dict(variant_facts(row))["loaded by"] == "the reference decoder, as float weights"
    alone = {**report, "variants": [native]}
    assert DECODED_MARK not in dict(definitions(alone))["Weights memory"]


def test_the_manifest_gives_the_scheme_of_each_layer(exported: Path) -> None:
    export = open_export(exported)
    assert export.format == "compressed-tensors"
    assert export.schemes["model.layers.0.mlp.down_proj"] == IntScheme(8, 32, False)
    assert export.schemes["model.layers.0.mlp.up_proj"] == IntScheme(4, 32, True)
    assert "lm_head" not in export.schemes
