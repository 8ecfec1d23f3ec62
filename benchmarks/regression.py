"""What a regression check finds on a trained model, and how often it is wrong.

    python benchmarks/regression.py MODEL FOLDER [--repetitions N]

It accepts one check of a 3-bit recipe, repeats it honestly, quantizing anew each time, and then checks the recipe with
one thing wrong at a time. Every file is scored in a process of its own, so speeds differ as they do in practice. It
prints a table, and then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from quantkit.recipe import Recipe
from quantkit.regression import Check
from quantkit.regression.api import accept, check

GATES = ["perplexity +1 %", "kl_divergence.mean +10 %", "size_bytes +0 %", "decode_tokens_per_second -10 %"]
VARIANT: dict[str, Any] = {"name": "int3", "method": "gptq", "bits": 3, "group_size": -1, "damping": 0.01}


def recipe(model: Path, folder: Path, variant: dict[str, Any] = VARIANT, **calibration: Any) -> Recipe:
    data = {
        "name": "regression",
        "model": {"source": str(model)},
        "calibration": {"dataset": "instructions_mini", "samples": 64, "max_length": 128, **calibration},
        "variants": [variant],
        "evaluation": {"texts": ["prose"], "context_length": 256, "max_tokens": 8192, "device": "cpu"},
        "report": {"folder": str(folder / "reports" / "regression"), "formats": ["json"]},
        "gates": GATES,
    }
    return Recipe.parse(yaml.safe_dump(data))


def damaged(model: Path, folder: Path, layer: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of the model with one layer changed in its shard."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(layer)]:
            tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def wrong(model: Path, folder: Path) -> dict[str, Recipe]:
    """The recipe with one thing wrong at a time."""
    torch.manual_seed(0)
    layer = "layers.2.mlp.down_proj.weight"
    scaled = damaged(model, folder / "scaled", layer, lambda weight: weight * 1.5)
    noised = damaged(model, folder / "noised", layer, lambda weight: weight + weight.std() * torch.randn(weight.shape))
    records = folder / "zeros.jsonl"
    records.write_text("".join(json.dumps({"text": "0 " * 120}) + "\n" for _ in range(64)))
    patched = {**VARIANT, "overrides": {layer.removesuffix(".weight"): {"bits": 2}}}
    return {
        "layer scaled": recipe(scaled, folder),
        "layer noised": recipe(noised, folder),
        "other calibration": recipe(model, folder, dataset=str(records)),
        "lower damping": recipe(model, folder, {**VARIANT, "damping": 1e-7}),
        "2 bits in one layer": recipe(model, folder, patched),
    }


def row(name: str, found: Check) -> dict[str, Any]:
    differences = {
        result.gate: {"outcome": result.outcome, "difference": result.worst.difference, "low": result.worst.low}
        for result in found.gates
        if result.worst is not None
    }
    return {"check": name, "verdict": found.verdict, "gates": differences}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repetitions", type=int, default=10)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    plain = recipe(given.model, given.folder)
    rows = [row("first", check(plain))]
    accept("latest", recipe=plain)
    for number in range(given.repetitions):
        shutil.rmtree(plain.folder / "variants")
        rows.append(row(f"honest {number + 1}", check(plain)))
    rows += [row(name, check(each)) for name, each in wrong(given.model, given.folder).items()]
    for each in rows:
        told = "  ".join(f"{about['difference'] or 0:+8.2%} {about['outcome']:9}" for about in each["gates"].values())
        print(f"{each['check']:22} {each['verdict']:10} {told}")
    print(json.dumps({"gates": GATES, "checks": rows}))


if __name__ == "__main__":
    main()
