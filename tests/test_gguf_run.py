"""GGUF files in a run: quantized, scored by llama.cpp and by the reference decoder, and verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import quantkit
from quantkit.exports import open_export
from quantkit.recipe import Recipe
from quantkit.system.artifacts import read_json
from tests.runs import score_here
from tests.tiny import make_model

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return make_model(folder, dtype=torch.float16, tie_word_embeddings=True, **SHAPE)


@pytest.fixture(scope="module")
def report(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    recipe = Recipe.parse(f"""
        name: gguf
        model: {{source: "{model}"}}
        calibration: {{dataset: instructions_mini, samples: 4, max_length: 64, inputs: float}}
        defaults: {{format: gguf, group_size: 32}}
        variants:
          - {{name: gptq-q4-0, method: gptq}}
          - {{name: gptq-q4-1, method: gptq, symmetric: false, zeros: float}}
          - {{name: q4-k-m, method: llama.cpp, scheme: q4_k_m, embeddings: {{}}}}
          - {{name: f16, method: none, scheme: float16}}
        evaluation: {{texts: [prose], context_length: 64, max_tokens: 256}}
        report: {{folder: "{folder}", formats: [json]}}
    """)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.evaluation.stage.run_job", score_here)
        return quantkit.run(recipe)


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["variants"]}


def test_every_variant_is_scored_by_llama_cpp(report: dict[str, Any]) -> None:
    assert report["status"] == "ok", [row["error"] for row in report["variants"]]
    for row in report["variants"]:
        assert row["loaded_by"] == "llama.cpp"
        assert row["speed"]["decode"]["tokens_per_second"] > 0
        assert row["size_bytes"] == next(Path(row["checkpoint"]).glob("model-*.gguf")).stat().st_size


def test_the_divergence_is_that_of_the_file(report: dict[str, Any], model: Path) -> None:
    found = {name: row["metrics"]["kl_divergence"]["prose"]["mean"] for name, row in rows(report).items()}
    assert found["f16"] < 1e-5
    assert found["f16"] * 20 < found["gptq-q4-1"]
    folder = Path(rows(report)["gptq-q4-0"]["checkpoint"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.evaluation.run_job", score_here)
        decoded = quantkit.evaluate(
            folder,
            texts=["prose"],
            reference=model,
            loader="reference",
            context_length=64,
            max_tokens=256,
            metrics=["kl_divergence"],
        )
    assert decoded["loaded_by"] == "reference"
    assert decoded["metrics"]["kl_divergence"]["prose"]["mean"] == pytest.approx(found["gptq-q4-0"], rel=0.1)


def test_a_tied_head_is_the_quantized_embedding(report: dict[str, Any]) -> None:
    file = next(Path(rows(report)["q4-k-m"]["checkpoint"]).glob("model-*.gguf"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert "output.weight" not in kinds
    assert kinds["token_embd.weight"] == "Q6_K"
    assert kinds["blk.0.attn_q.weight"] == "Q4_K"


def test_the_importance_matrix_names_every_quantized_layer(report: dict[str, Any]) -> None:
    folder = Path(rows(report)["q4-k-m"]["checkpoint"])
    names = {tensor.name for tensor in gguf.GGUFReader(folder / "imatrix.gguf").tensors}
    linears = [layer for layer in open_export(folder).schemes if "embed" not in layer]
    assert len([name for name in names if name.endswith(".in_sum2")]) == len(linears)
    assert "imatrix.gguf" in read_json(folder / "manifest.json")["files"]
    assert (Path(rows(report)["gptq-q4-0"]["checkpoint"]) / "imatrix.gguf").exists(), "gptq knows the inputs as well"


def test_a_run_again_reuses_every_file(report: dict[str, Any]) -> None:
    recipe = Recipe.parse(report["recipe_text"])
    before = {path: path.stat().st_mtime_ns for path in recipe.folder.rglob("*.gguf")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.evaluation.stage.run_job", score_here)
        again = quantkit.run(recipe)
    assert again["status"] == "ok"
    assert {path: path.stat().st_mtime_ns for path in recipe.folder.rglob("*.gguf")} == before


def test_verify_keeps_its_verdict_and_changes_nothing_else(report: dict[str, Any]) -> None:
    from quantkit.exports.manifest import identity

    folder = Path(rows(report)["gptq-q4-0"]["checkpoint"])
    before = identity(folder)
    verdict = quantkit.verify(folder, runtime="llama.cpp")
    assert verdict["passed"], verdict["reason"]
    assert identity(folder) == before
    assert read_json(folder / "verified.json")["llama.cpp"]["passed"]
