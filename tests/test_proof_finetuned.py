"""A fine-tuned model for real: SmolLM2-135M with a QLoRA adapter, trained, merged, quantized and scored.

These take minutes; ``make proofs`` installs the package and runs them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quantkit
from quantkit.recipe import Recipe

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetuned")


@pytest.fixture(scope="module")
def training(folder: Path) -> dict[str, Any]:
    pytest.importorskip("bitsandbytes")
    command = [sys.executable, str(ROOT / "benchmarks" / "train_lora.py"), "--steps", "60", "--length", "192"]
    done = subprocess.run(
        [*command, "--nf4-base", "--out", str(folder / "adapters" / "smollm2-lora")],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def report(training: dict[str, Any], folder: Path) -> dict[str, Any]:
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    try:
        return quantkit.run(Recipe.load(ROOT / "recipes" / "finetuned.yaml"))
    finally:
        patch.undo()


def divergence(report: dict[str, Any], variant: str, text: str) -> float:
    row = next(row for row in report["variants"] if row["name"] == variant)
    return float(row["metrics"]["kl_divergence"][text]["mean"])


def test_the_training_learns(training: dict[str, Any]) -> None:
    assert training["loss_last"] < training["loss_first"] - 0.1


def test_every_row_is_there(report: dict[str, Any]) -> None:
    assert report["status"] == "ok", [row["error"] for row in report["variants"]]
    assert [row["name"] for row in report["variants"]] == ["merged-nf4", "rtn-int8", "rtn-int4", "gptq-int4"]


def test_the_merge_is_what_peft_computes(report: dict[str, Any]) -> None:
    check = report["source"]["merge"]["check"]
    assert check["relative_difference"] < check["tolerance"]
    assert check["kl_divergence"] < check["adapter_kl_divergence"] / 100


@pytest.mark.parametrize("text", ["prose", "answers"])
def test_the_two_bases_differ_by_the_error_of_nf4(report: dict[str, Any], text: str) -> None:
    assert 1e-4 < divergence(report, "merged-nf4", text) < 1


@pytest.mark.parametrize("text", ["prose", "answers"])
def test_variants_lose_as_those_of_any_model(report: dict[str, Any], text: str) -> None:
    assert divergence(report, "rtn-int8", text) < 0.01
    assert divergence(report, "gptq-int4", text) < divergence(report, "rtn-int4", text)
