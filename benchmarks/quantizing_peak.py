"""Peak memory of a quantizing run beside its estimate, over depths and calibration sizes: each run in a fresh process.

    python benchmarks/quantizing_peak.py

The peak is what the resident set grows by from after the imports on, reset before the run (Linux). It prints a table
and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DEPTHS = (2, 4)
ROWS = (32, 64, 128)
LENGTH = 256
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Has glibc return what is freed, so that the peak is that of what is alive; by default it keeps pieces to 32 MiB."""
SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
}


SMALL = {**SHAPE, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}


def model_of(folder: Path, depth: int, shape: dict[str, Any] = SHAPE) -> Path:
    """A random Llama."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_hidden_layers=depth)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def status(key: str) -> int:
    """A figure of this process in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {key}")
    return int(found[1]) * 1024


def measure(folder: Path, rows: int, out: Path, keys: dict[str, Any]) -> dict[str, int]:
    """Quantize in this process and tell its peak beside the estimate."""
    import torch

    from quantkit.engine.precision import pass_dtype
    from quantkit.estimation import estimate
    from quantkit.recipe import VariantSpec
    from quantkit.validation import parse_section

    feed = keys.pop("feed", "quantized")
    variant = parse_section(VariantSpec, {"name": "v", **keys}, "benchmark")
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, SHAPE["vocab_size"], (rows, LENGTH), generator=draw).tolist()
    computing = pass_dtype(torch.device("cpu"), torch.bfloat16)
    found = estimate(str(folder), calibration_tokens=rows * LENGTH, feed=feed, pass_dtype=str(computing)[6:], **keys)
    _quantize(model_of(out.parent / "small", 1, SMALL), tokens[:1], out.parent / "warm", feed, variant)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    _quantize(folder, tokens, out, feed, variant)
    return {"measured": status("VmHWM") - before, "estimated": found.part("quantizing").nbytes}


def _quantize(folder: Path, tokens: list[list[int]], out: Path, feed: Any, variant: Any) -> None:
    """A run; the first one, of a small model, loads what the packages load when they are used."""
    from quantkit.quantization import Job, quantize

    quantize(Job(folder, {}, "bfloat16", tokens, "x", feed=feed, device="cpu"), variant, out)


def measured(folder: Path, rows: int, keys: dict[str, Any]) -> dict[str, int]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, __file__, "--child", str(folder), str(rows), scratch, json.dumps(keys)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | GIVES_BACK)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(keys: dict[str, Any], depths: tuple[int, ...] = DEPTHS, rows: tuple[int, ...] = ROWS) -> list[dict[str, int]]:
    """Every depth with every number of rows."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for depth in depths:
            folder = model_of(Path(scratch) / f"depth{depth}", depth)
            for count in rows:
                figures = measured(folder, count, keys)
                found.append({"blocks": depth, "tokens": count * LENGTH, **figures})
                ratio = figures["estimated"] / figures["measured"]
                sizes = (f"{figures[key] / 2**20:7.1f} MiB" for key in ("estimated", "measured"))
                print(depth, "blocks", f"{count * LENGTH:6d} tokens", *sizes, f"{ratio:.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=json.loads, default={"method": "gptq", "group_size": 64})
    parser.add_argument("--child", nargs=4)
    given = parser.parse_args()
    if given.child:
        folder, rows, out, keys = given.child
        print(json.dumps(measure(Path(folder), int(rows), Path(out) / "out", json.loads(keys))))
        return
    print(json.dumps(table(given.keys)))


if __name__ == "__main__":
    main()
