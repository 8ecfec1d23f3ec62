"""What each stage of a run takes beside its estimate, on a random Llama that is wide and short, in a fresh process.

    python benchmarks/stage_peaks.py [--hidden 1024] [--blocks 4] [--model FOLDER]

The run is that of a recipe with a pass backward, two walks, a training, and a scoring of each file. It prints a table
in Markdown and one line of JSON, both from ``stages`` of the report. What the C library would keep of freed memory goes
back at once (glibc), so that a peak is that of what is alive.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
TRAINED: dict[str, Any] = {"name": "recovered", "steps": 2, "evaluations": 1, "batch_tokens": 1024}


def recipe(model: Path, folder: Path, tokens: int, methods: Sequence[str]) -> dict[str, Any]:
    """The run that is measured: variants by some methods, and a training of the first."""
    variants = [{"name": method, "method": method, "bits": 4} for method in methods]
    return {
        "name": "peaks",
        "model": str(model),
        "calibration": {
            "dataset": "instructions_mini",
            "samples": max(8, tokens // 250),
            "max_length": 256,
            "sensitivity": True,
        },
        "defaults": {"group_size": 64},
        "variants": [*variants, {**TRAINED, "recover": methods[0]}],
        "evaluation": {"texts": ["prose"], "max_tokens": 2048, "context_length": 512, "device": "cpu"},
        "quantization": {"device": "cpu"},
        "report": {"folder": str(folder), "formats": ["json"]},
        "history": {"enabled": False},
    }


def measure(
    scratch: Path, model: Path | None, hidden: int, blocks: int, tokens: int, methods: Sequence[str]
) -> list[dict[str, Any]]:
    """Run it in this process; returns ``stages`` of its report."""
    import torch

    import quantkit

    if model is None:
        from tests.tiny import make_model

        heads = hidden // 64
        model = make_model(
            scratch / "model",
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=64,
            num_hidden_layers=blocks,
            dtype=torch.bfloat16,
        )
    report = quantkit.run(recipe(model, scratch / "run", tokens, methods))
    failed = [f"{row['name']}: {row['error']}" for row in report["variants"] if row["status"] != "ok"]
    if failed:
        raise RuntimeError("; ".join(failed))
    found: list[dict[str, Any]] = report["stages"]
    return found


def table(stages: list[dict[str, Any]]) -> str:
    """The stages that have an estimate and a measurement."""
    head = "| stage | how | estimated | measured | estimated / measured | of the whole process |"
    lines = [head, "|:--|:--|--:|--:|--:|--:|"]
    for each in stages:
        if each["ratio"] is not None:
            sizes = " | ".join(f"{each[key] / 2**20:,.1f} MiB" for key in ("estimated_bytes", "measured_bytes"))
            lines.append(
                f"| {each['stage']} | {each['how']} | {sizes} | {each['ratio']:.3f} | {each['peak_ratio']:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        sys.path.insert(0, str(ROOT))
        print(json.dumps(measure(given.child, given.model, given.hidden, given.blocks, given.tokens, given.methods)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, *sys.argv, "--child", scratch]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | GIVES_BACK)
    stages = json.loads(done.stdout.splitlines()[-1])
    print(table(stages))
    print(json.dumps(stages))


if __name__ == "__main__":
    main()
